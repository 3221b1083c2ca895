"""Measures of calibration and of selective answers, by hand and against scikit-learn."""

import numpy as np
import pytest

from lfm.evaluation.calibration import (
    adaptive_error,
    auroc,
    brier,
    equal_mass_bins,
    equal_mass_error,
    error_by_chance,
    log_loss,
    risk_coverage,
    selective_accuracy,
)

SURE = np.array([0.1, 0.4, 0.4, 0.8, 0.9, 0.9])
RIGHT = np.array([False, True, False, True, True, False])


def drawn(n=500, seed=0):
    draws = np.random.Generator(np.random.PCG64(seed))
    sure = np.round(draws.random(n), 2)  # with equal ones among them
    return sure, draws.random(n) < sure


def test_auroc_brier_and_log_loss_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, of the extra `dev`")
    for seed in range(5):
        sure, right = drawn(seed=seed)
        assert auroc(sure, right) == pytest.approx(metrics.roc_auc_score(right, sure), abs=1e-12)
        assert brier(sure, right) == pytest.approx(metrics.brier_score_loss(right, sure), abs=1e-12)
        inside = np.clip(sure, 0.01, 0.99)
        assert log_loss(inside, right) == pytest.approx(metrics.log_loss(right, inside), abs=1e-12)


def test_bins_of_equal_mass_are_those_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration", reason="needs scikit-learn, of the extra `dev`")
    draws = np.random.Generator(np.random.PCG64(1))
    sure = draws.random(900)  # none equal
    right = draws.random(900) < sure
    accuracy, mean = calibration.calibration_curve(right, sure, n_bins=15, strategy="quantile")
    found = equal_mass_bins(sure, right)
    assert [each.answers for each in found] == [60] * 15
    assert np.allclose([each.sureness for each in found], mean) and np.allclose(
        [each.accuracy for each in found], accuracy
    )
    assert equal_mass_error(sure, right) == pytest.approx(np.abs(accuracy - mean).mean())
    assert adaptive_error(sure, right) == pytest.approx(np.abs(accuracy - mean).mean())


@pytest.mark.parametrize("n", [100, 3000])
def test_a_perfect_probability_has_the_error_of_chance(n):
    draws = np.random.Generator(np.random.PCG64(1))
    sure = draws.beta(3, 1, n)
    found = [equal_mass_error(sure, draws.random(n) < sure) for _ in range(200)]
    assert error_by_chance(sure) == pytest.approx(np.mean(found), rel=0.1)
    assert error_by_chance(sure) < equal_mass_error(sure, draws.random(n) < sure - 0.3)


def test_equally_sure_answers_stay_in_one_bin():
    found = equal_mass_bins(np.full(100, 0.7), np.arange(100) < 60)
    assert [(round(each.sureness, 6), each.accuracy, each.answers) for each in found] == [(0.7, 0.6, 100)]
    assert sum(each.answers for each in equal_mass_bins(*drawn())) == 500


def test_perfect_information_has_an_auroc_of_1_and_none_of_a_half():
    draws = np.random.Generator(np.random.PCG64(0))
    right = draws.random(20_000) < 0.6
    assert auroc(right.astype(float), right) == 1.0
    assert auroc(np.ones(len(right)), right) == 0.5
    assert auroc(draws.random(len(right)), draws.permutation(right)) == pytest.approx(0.5, abs=0.02)
    assert np.isnan(auroc(np.ones(3), np.ones(3, bool)))


def test_risk_by_coverage():
    found = risk_coverage(SURE, RIGHT)
    assert np.allclose(found.coverage, [2 / 6, 3 / 6, 5 / 6, 1])
    assert np.allclose(found.risk, [1 / 2, 1 / 3, 2 / 5, 1 / 2])
    assert found.area == pytest.approx(2 / 6 / 2 + 1 / 6 / 3 + 2 / 6 * 2 / 5 + 1 / 6 / 2)
    assert (found.coverage_at(0.45), found.coverage_at(0.1)) == (5 / 6, 0.0)


def test_selective_accuracy():
    accuracy, coverage = selective_accuracy(SURE, RIGHT, 0.85)
    assert (accuracy, coverage) == (0.5, 2 / 6)
    assert np.isnan(selective_accuracy(SURE, RIGHT, 0.95)[0])
