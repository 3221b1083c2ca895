import itertools

import pytest

from lfm.training.schedule import ScheduleConfig, lr_factor


def _curve(steps=100, **config):
    return [lr_factor(ScheduleConfig(**config), step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_starts_above_zero(kind):
    assert _curve(kind=kind, warmup_steps=10)[:11] == pytest.approx([i / 10 for i in range(1, 11)] + [1.0], abs=1e-3)


def test_cosine_ends_at_the_ratio_and_never_rises():
    curve = _curve(kind="cosine", warmup_steps=10, min_lr_ratio=0.1)[10:]
    assert curve[-1] == pytest.approx(0.1) and all(a >= b for a, b in itertools.pairwise(curve))
    assert curve[44] == pytest.approx(0.55, abs=0.01)


def test_wsd_is_stable_and_then_falls_linearly():
    curve = _curve(kind="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert curve[9:80] == [1.0] * 71
    assert curve[80:] == pytest.approx([1 - i / 20 for i in range(1, 21)])


def test_a_warmup_longer_than_the_run_is_all_warmup():
    assert _curve(5, kind="cosine", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
