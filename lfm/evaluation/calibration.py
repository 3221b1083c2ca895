"""How well a classifier knows how often it is right."""

import numpy as np


def calibration_error(sureness: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error: the mean of |sureness - accuracy| over bins of equal width, weighted by size."""
    bins = np.minimum((sureness * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, sureness - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(right))
