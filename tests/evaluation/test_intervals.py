"""Bootstrap intervals against every resample there is, and against SciPy's."""

import itertools

import numpy as np
import pytest

from lfm.evaluation.intervals import paired_interval


def test_of_few_units_the_interval_is_that_of_every_resample():
    one, other = np.array([1.0, 2.0, 4.0, 3.0, 2.5]), np.array([1.5, 1.0, 5.0, 3.5, 2.0])
    sizes = np.array([10.0, 20.0, 15.0, 5.0, 12.0])
    every = [list(chosen) for chosen in itertools.product(range(5), repeat=5)]
    ratios = [(other - one)[chosen].sum() / sizes[chosen].sum() for chosen in every]
    found = paired_interval(one, other, sizes, resamples=100_000)
    assert found.estimate == pytest.approx((other - one).sum() / sizes.sum())
    spread = max(ratios) - min(ratios)
    assert np.allclose(found[1:], np.quantile(ratios, [0.025, 0.975]), atol=0.005 * spread)


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which lm-eval brings")
    draws = np.random.default_rng(0)
    sizes = draws.integers(500, 2048, 100).astype(float)
    one = draws.normal(2.0, 0.3, 100) * sizes
    other = one + draws.normal(-0.04, 0.1, 100) * sizes

    def ratio(one, other, sizes, axis=-1):
        return (other - one).sum(axis=axis) / sizes.sum(axis=axis)

    theirs = stats.bootstrap(
        (one, other, sizes), ratio, paired=True, vectorized=True, method="percentile", n_resamples=5_000, rng=1
    ).confidence_interval
    ours = paired_interval(one, other, sizes, resamples=5_000)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width and abs(ours.high - theirs.high) < 0.05 * width
    assert ours.excludes_zero and not paired_interval(one, one, sizes).excludes_zero


def test_the_same_seed_gives_the_same_interval_however_many_are_drawn_at_once(monkeypatch):
    one, other = np.arange(50.0), np.arange(50.0)[::-1]
    found = paired_interval(one, other, seed=3)
    assert found == paired_interval(one, other, seed=3) != paired_interval(one, other, seed=4)
    monkeypatch.setattr("lfm.evaluation.intervals._DRAWS", 777)
    assert found == paired_interval(one, other, seed=3)
