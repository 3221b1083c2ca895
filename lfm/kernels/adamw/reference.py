"""The definition of an AdamW update."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_reference_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lrs: Tensor,
    shared: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decays: Sequence[float],
    workings: Sequence[Tensor | None],
) -> None:
    corrections, scale, made = shared[:2], shared[2], shared[3] == 0
    for k, (parameter, exp_avg, exp_avg_sq) in enumerate(zip(parameters, exp_avgs, exp_avg_sqs, strict=True)):
        scaled, lr = grads[k] * scale, lrs[k]
        mean, square = exp_avg.lerp(scaled, 1 - betas[0]), exp_avg_sq.lerp(scaled * scaled, 1 - betas[1])
        update = corrections[0] * mean / ((square * corrections[1]).sqrt() + eps)
        moved = parameter * (1 - lr * weight_decays[k]) - lr * update
        for old, new in ((exp_avg, mean), (exp_avg_sq, square), (parameter, moved)):
            old.copy_(torch.where(made, new, old))  # numbers of a refused update may be NaN
        working = workings[k]
        if working is not None:
            working.copy_(torch.where(made, parameter, working))
