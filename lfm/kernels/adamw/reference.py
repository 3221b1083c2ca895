"""The definition of an AdamW update."""

import torch
from torch import Tensor


def adamw_reference_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    corrections: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
    working: Tensor | None,
) -> None:
    scaled = grad if scale is None else grad * scale
    mean = exp_avg.lerp(scaled, 1 - betas[0])
    square = exp_avg_sq.lerp(scaled * scaled, 1 - betas[1])
    update = corrections[0] * mean / ((square * corrections[1]).sqrt() + eps)
    moved = parameter * (1 - lr * weight_decay) - lr * update
    for old, new in ((parameter, moved), (exp_avg, mean), (exp_avg_sq, square)):
        old.copy_(new if scale is None else torch.where(scale.isfinite(), new, old))
    if working is not None:
        working.copy_(parameter)
