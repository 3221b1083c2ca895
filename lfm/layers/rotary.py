"""Angles of rotary position embedding.  Su et al. 2021 (arXiv 2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.kernels.backend import widest


def rotary_tables(
    positions: Int[Tensor, "B T"], *, head_size: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]:
    """cos and sin of `position * base^(-2j / head_size)`, j < head_size / 2.

    Angles are formed in float64, where the device has it, so that position 8191 is as exact as position 0, then rounded
    to `dtype`.
    """
    wide = widest(positions.device)
    j = torch.arange(head_size // 2, dtype=wide, device=positions.device)
    angles = positions[:, None, :, None].to(wide) * base ** (-2 * j / head_size)
    return angles.cos().to(dtype), angles.sin().to(dtype)
