"""How well a classifier knows how often it is right."""

from typing import NamedTuple

import numpy as np


def calibration_error(sureness: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error: the mean of |sureness - accuracy| over bins of equal width, weighted by size."""
    bins = np.minimum((sureness * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, sureness - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(right))


class Bin(NamedTuple):
    """Of a reliability diagram."""

    sureness: float
    """Mean."""
    accuracy: float
    answers: int


def equal_mass_bins(sureness: np.ndarray, right: np.ndarray, num_bins: int = 15) -> list[Bin]:
    """Bins of as many answers each, from the least sure; equally sure ones stay in one bin."""
    order = np.argsort(sureness, kind="stable")
    sure, correct = np.asarray(sureness, np.float64)[order], np.asarray(right, np.float64)[order]
    bounds = np.round(np.linspace(0, len(sure), num_bins + 1)).astype(int)
    bounds = np.unique(np.searchsorted(sure, sure[np.minimum(bounds[:-1], len(sure) - 1)], side="left"))
    parts = zip(bounds, [*bounds[1:], len(sure)], strict=True)
    return [Bin(float(sure[a:b].mean()), float(correct[a:b].mean()), int(b - a)) for a, b in parts if b > a]


def equal_mass_error(sureness: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: Naeini et al. 2015 with quantiles."""
    bins = equal_mass_bins(sureness, right, num_bins)
    return sum(each.answers * abs(each.sureness - each.accuracy) for each in bins) / len(right)


def error_by_chance(sureness: np.ndarray, num_bins: int = 15, draws: int = 100) -> float:
    """What `equal_mass_error` is on average where each answer is right with exactly the probability that is told: few
    answers in a bin are never right as often as they should be."""
    chance = np.random.Generator(np.random.PCG64(0)).random((draws, len(sureness)))
    return float(np.mean([equal_mass_error(sureness, each < sureness, num_bins) for each in chance]))


def adaptive_error(sureness: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Adaptive calibration error of right and wrong answers: the mean gap over bins of equal mass, each counted alike.

    Nixon et al. 2019 (arXiv 1904.01685), with the two classes right and wrong, which have the same gaps.
    """
    return float(np.mean([abs(each.sureness - each.accuracy) for each in equal_mass_bins(sureness, right, num_bins)]))


def brier(sureness: np.ndarray, right: np.ndarray) -> float:
    """Mean squared difference."""
    return float(np.mean((np.asarray(sureness) - right) ** 2))


def log_loss(sureness: np.ndarray, right: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats; probabilities are kept 1e-12 from 0 and 1."""
    p = np.clip(np.asarray(sureness, np.float64), 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(right, np.log(p), np.log1p(-p))))


def auroc(score: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right answer has the higher score than a wrong one, equal ones counting half; NaN where there
    are only such or such."""
    right = np.asarray(right, bool)
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # mean rank of equal scores, from 1
    return float((ranks[right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


class RiskCoverage(NamedTuple):
    """Of answering the surest first."""

    coverage: np.ndarray
    """Shares of the questions that are answered, at each place where scores differ."""
    risk: np.ndarray
    """Share of wrong ones among them."""

    @property
    def area(self) -> float:
        """Mean risk over answered counts: less is better (Geifman and El-Yaniv 2017, arXiv 1705.08500)."""
        steps = np.diff(np.concatenate([[0.0], self.coverage]))
        return float((self.risk * steps).sum())

    def coverage_at(self, risk: float) -> float:
        """The largest coverage at which the risk is no more; 0 where none is."""
        fitting = self.coverage[self.risk <= risk]
        return float(fitting.max()) if len(fitting) else 0.0


def risk_coverage(score: np.ndarray, right: np.ndarray) -> RiskCoverage:
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    sorted_score, wrong = np.asarray(score)[order], ~np.asarray(right, bool)[order]
    ends = np.flatnonzero(np.append(sorted_score[1:] != sorted_score[:-1], True))
    answered = ends + 1
    return RiskCoverage(answered / len(order), np.cumsum(wrong)[ends] / answered)


def selective_accuracy(score: np.ndarray, right: np.ndarray, threshold: float) -> tuple[float, float]:
    """(accuracy of the answers that are given, share that is); the accuracy is NaN where none is."""
    chosen = np.asarray(score) >= threshold
    return (float(np.asarray(right)[chosen].mean()) if chosen.any() else float("nan")), float(chosen.mean())
