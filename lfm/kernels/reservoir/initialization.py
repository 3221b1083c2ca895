"""The random recurrent matrix of one reservoir."""

import torch
from torch import Tensor


def make_reservoir(num_units: int, connectivity: float, spectral_radius: float, generator: torch.Generator) -> Tensor:
    """Draw a sparse recurrent matrix, float64 `[num_units, num_units]`, whose largest eigenvalue modulus is
    `spectral_radius`.

    Every row has `connectivity * num_units` non-zero normal entries in random columns, rounded down or up in turn so
    that the whole matrix has the connectivity asked for, and at least one.  The radius comes from a float64
    eigenvalue solve; a draw with (nearly) no radius of its own cannot be scaled and is drawn again.
    """
    if not 0 < connectivity <= 1:
        raise ValueError(f"connectivity={connectivity} must lie in (0, 1]")
    if spectral_radius < 0:
        raise ValueError(f"spectral_radius={spectral_radius} must not be negative")

    bounds = (torch.arange(num_units + 1, dtype=torch.float64) * connectivity * num_units).round()
    fan_in = bounds.diff().clamp_min(1)
    while True:
        # Stable: of 512 fp32 draws two are equal in every hundredth row, and would fall as the processor sorts.
        order = torch.rand(num_units, num_units, generator=generator).argsort(dim=1, stable=True)
        mask = order < fan_in[:, None]
        weight = torch.randn(num_units, num_units, generator=generator, dtype=torch.float64) * mask
        radius = torch.linalg.eigvals(weight).abs().max()
        # A random matrix has a radius near its root-mean-square row norm.  Scaling up one that has far less (a
        # nilpotent one has none) gives a matrix of huge norm, which forgets its start slowly.
        if radius > 0.1 * weight.square().sum(dim=1).mean().sqrt():
            return weight * (spectral_radius / radius)
