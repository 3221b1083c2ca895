"""Whether a difference between two models is more than chance: the paired bootstrap."""

from typing import NamedTuple

import numpy as np

_DRAWS = 1 << 22
"""So many are held at once."""


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_interval(
    one: np.ndarray,
    other: np.ndarray,
    sizes: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Of sum(other - one) / sum(sizes) over units that both were measured on, such as documents: `[n]` each, n >= 2.

    `sizes` are by default 1, so that it is the mean difference.  The percentile interval of Efron and Tibshirani 1993,
    An Introduction to the Bootstrap, section 13.3: units are drawn with replacement, both measurements together.
    """
    differences = np.asarray(other, np.float64) - np.asarray(one, np.float64)
    weights = np.ones_like(differences) if sizes is None else np.asarray(sizes, np.float64)
    count = len(differences)
    assert count >= 2 and weights.shape == differences.shape, (differences.shape, weights.shape)
    draws = np.random.Generator(np.random.PCG64(seed))
    found, at_once = [], max(1, _DRAWS // count)
    for start in range(0, resamples, at_once):
        chosen = draws.integers(0, count, (min(at_once, resamples - start), count))
        found.append(differences[chosen].sum(axis=1) / weights[chosen].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(float(differences.sum() / weights.sum()), float(low), float(high))
