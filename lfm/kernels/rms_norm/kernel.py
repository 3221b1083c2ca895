"""Triton kernels of the residual sum with RMSNorm.

Forward, a program owns one row.  Backward, it owns a share of the rows, whose part of the weight's gradient it keeps in
registers; the shares' parts are added in order by one reduction.  Shares depend on the number of rows alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARES = 264
"""Of rows that fill a program's time; of narrower ones there are as many more."""
LANES_OF_A_WARP = 256
"""Elements of a row that a warp holds."""


@triton.jit
def _add_rms_norm_fwd_kernel(
    x, y, weight, total, normalized, scale, eps, D: tl.constexpr, WIDTH: tl.constexpr, ADDED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    exists = column < D
    s = tl.load(x + row * D + column, exists, other=0).to(tl.float32)
    if ADDED:
        s += tl.load(y + row * D + column, exists, other=0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + row * D + column, rounded, exists)
        s = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 0) / D + eps)
    tl.store(scale + row, r)
    w = tl.load(weight + column, exists, other=0).to(tl.float32)
    tl.store(normalized + row * D + column, s * r * w, exists)


@triton.jit
def _add_rms_norm_bwd_kernel(
    grad_total, grad_normalized, total, weight, scale, grad, shares, num_rows, rows_of_a_share,
    D: tl.constexpr, WIDTH: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    exists = column < D
    w = tl.load(weight + column, exists, other=0).to(tl.float32)
    grad_weight = tl.zeros([WIDTH], tl.float32)
    first = share * rows_of_a_share
    end = tl.minimum(first + rows_of_a_share, num_rows)
    # A row ahead, so that memory works while a row is reduced; the last one comes in again, in vain.
    at = first * D + column
    r, s = tl.load(scale + first), tl.load(total + at, exists, other=0)
    g, b = tl.load(grad_normalized + at, exists, other=0), tl.load(grad_total + at, exists, other=0)
    for row in range(first, end):
        following = tl.minimum(row + 1, end - 1)
        at = following * D + column
        next_r, next_s = tl.load(scale + following), tl.load(total + at, exists, other=0)
        next_g = tl.load(grad_normalized + at, exists, other=0)
        next_b = tl.load(grad_total + at, exists, other=0) if SUMMED else b
        unit, a = s.to(tl.float32) * r, g.to(tl.float32)
        grad_weight += a * unit
        a *= w
        result = r * (a - unit * (tl.sum(a * unit, 0) / D))
        if SUMMED:
            result += b.to(tl.float32)
        tl.store(grad + row * D + column, result, exists)
        r, s, g, b = next_r, next_s, next_g, next_b
    tl.store(shares + share * D + column, grad_weight, exists)


def add_rms_norm_forward(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (x where y is None), normalized sum, and fp32 `[...]` the factor of each row; of contiguous tensors."""
    D = x.shape[-1]
    total, normalized = x if y is None else torch.empty_like(x), torch.empty_like(x)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        width = triton.next_power_of_2(D)
        arguments = (x, x if y is None else y, weight, total, normalized, scale, eps, D, width, y is not None)
        _add_rms_norm_fwd_kernel[(scale.numel(),)](*arguments, num_warps=_num_warps(width))
    return total, normalized, scale


def add_rms_norm_backward(
    grad_total: Tensor | None, grad_normalized: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum, which is that of both summands, and fp32 `[shares, D]` that sum to the weight's; of
    contiguous tensors."""
    D, num_rows = total.shape[-1], scale.numel()
    grad = torch.empty_like(total)
    width = triton.next_power_of_2(D)
    rows_of_a_share = max(1, triton.cdiv(num_rows, SHARES * max(1, 2048 // width)))
    num_shares = triton.cdiv(num_rows, rows_of_a_share)
    shares = weight.new_empty(num_shares, D, dtype=torch.float32)
    if num_rows:
        given = grad_normalized if grad_total is None else grad_total
        arguments = (given, grad_normalized, total, weight, scale, grad, shares, num_rows, rows_of_a_share)
        _add_rms_norm_bwd_kernel[(num_shares,)](
            *arguments, D, width, grad_total is not None, num_warps=_num_warps(width)
        )
    return grad, shares


def _num_warps(width: int) -> int:
    return min(16, max(1, width // LANES_OF_A_WARP))
