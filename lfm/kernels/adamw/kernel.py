"""Triton kernel of an AdamW update: each number is read and written once."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 8


@triton.jit
def _adamw_kernel(
    parameter, grad, exp_avg, exp_avg_sq, working, corrections, scale, lr, beta1, beta2, eps, decay, n,
    PUBLISHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < n
    p, g = tl.load(parameter + i, exists), tl.load(grad + i, exists) * scale
    m, v = tl.load(exp_avg + i, exists), tl.load(exp_avg_sq + i, exists)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    update = tl.load(corrections) * m / (tl.sqrt_rn(v * tl.load(corrections + 1)) + eps)
    p = p * (1 - lr * decay) - lr * update
    tl.store(parameter + i, p, exists)
    tl.store(exp_avg + i, m, exists)
    tl.store(exp_avg_sq + i, v, exists)
    if PUBLISHED:
        tl.store(working + i, p, exists)


def adamw_kernel_(
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
    """As `op.adamw_`, of contiguous tensors."""
    n = parameter.numel()
    if n == 0:
        return
    _adamw_kernel[(triton.cdiv(n, BLOCK),)](
        parameter, grad, exp_avg, exp_avg_sq, parameter if working is None else working, corrections,
        scale, lr, *betas, eps, weight_decay, n,
        PUBLISHED=working is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
