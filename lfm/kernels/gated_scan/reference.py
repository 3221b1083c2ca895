"""The definition, from the scan and plain PyTorch, and the path on CPUs."""

from torch import Tensor

from lfm.kernels.diagonal_scan import diagonal_scan


def gated_scan_reference(
    projections: Tensor, bias: Tensor, state: Tensor | None, reset: Tensor | None, delta_min: float, scale: float
) -> tuple[Tensor, Tensor]:
    value, delta, gate = projections.chunk(3, dim=-1)
    h, final = diagonal_scan(delta, bias, value, state, reset, delta_min=delta_min)
    y = gate.sigmoid() * h
    return y if scale == 1.0 else scale * y, final
