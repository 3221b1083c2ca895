"""Keeping a trained reservoir one that forgets its start: one that does not has no warm-up that is long enough."""

import math

import torch
from torch import Tensor

from lfm.kernels.backend import widest
from lfm.kernels.reservoir.warmup import WARMUP_NOTCHES

MOST_LEFT = 5e-4
"""Largest `power_norm` after the longest warm-up: at such values the warmed-up states are right to 1e-3."""
SHRINKAGE = 0.98


def power_norm(weight: Tensor, leak_rate: float, mean_gain: float, steps: int) -> Tensor:
    """`||J^steps||_F / sqrt(N)`, fp64 `[...]`, of weights `[..., N, N]`, with `J = (1 - a) I + a g W`.

    It is the root mean square of what is left, after so many steps, of a perturbation of the state, linearised at the
    mean gain g of tanh.  The spectral radius does not tell: powers of a matrix may grow for long before they fall.
    """
    num_units = weight.shape[-1]
    wide = widest(weight.device)
    identity = torch.eye(num_units, dtype=wide, device=weight.device)
    step = (1 - leak_rate) * identity + leak_rate * mean_gain * weight.to(wide)
    return torch.linalg.matrix_power(step, steps).norm(dim=(-2, -1)) / math.sqrt(num_units)


def contraction(weight: Tensor, leak_rate: float, mean_gain: float) -> Tensor:
    """By what to multiply each of `weight [R, N, N]`, fp64 `[R]`: the largest power of 0.98, up to 1, with which
    `power_norm` after the longest warm-up is at most 5e-4.

    1 where no factor would do: the leak alone keeps more than that, or a weight or the gain is not finite.
    """
    steps = WARMUP_NOTCHES[-1]
    factors = torch.ones(len(weight), dtype=widest(weight.device), device=weight.device)
    finite = math.isfinite(mean_gain) and bool(weight.isfinite().all())
    if (1 - leak_rate) ** steps > MOST_LEFT or not finite:
        return factors
    while True:
        # Overflow is too much as well, and so is a NaN that comes of it.
        too_much = ~(power_norm(weight * factors[:, None, None], leak_rate, mean_gain, steps) <= MOST_LEFT)
        if not too_much.any():
            return factors
        factors = torch.where(too_much, factors * SHRINKAGE, factors)
