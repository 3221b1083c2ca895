"""The definition of an AdamW update."""

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
    scale: float,
    working: Tensor | None,
) -> None:
    scaled = grad * scale
    exp_avg.lerp_(scaled, 1 - betas[0])
    exp_avg_sq.lerp_(scaled * scaled, 1 - betas[1])
    update = corrections[0] * exp_avg / ((exp_avg_sq * corrections[1]).sqrt() + eps)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    if working is not None:
        working.copy_(parameter)
