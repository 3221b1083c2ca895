"""Triton kernels of LayerNorm.

A program owns tiles of rows.  Backward it keeps its part of the gradients of weight and bias in registers; the parts
are added in order by one reduction, and depend on the number of rows alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, NUM_WARPS = 2048, 4
MOST_ROWS = 32
SHARES = 132
"""Programs of a backward pass, at most."""


@triton.jit
def _layer_norm_fwd_kernel(
    x, weight, bias, normalized, means, scales, eps, num_rows, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    exists = (row < num_rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    given = tl.load(x + at, exists, other=0).to(tl.float32)
    mean = tl.sum(given, 1) / D
    centred = tl.where(exists, given - mean[:, None], 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(means + row, mean, row < num_rows)
    tl.store(scales + row, scale, row < num_rows)
    w = tl.load(weight + column, column < D, other=0).to(tl.float32)
    b = tl.load(bias + column, column < D, other=0).to(tl.float32)
    tl.store(normalized + at, centred * scale[:, None] * w[None, :] + b[None, :], exists)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_normalized, x, weight, means, scales, grad, weight_shares, bias_shares, num_rows, rows_of_a_share,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, column < D, other=0).to(tl.float32)
    grad_weight, grad_bias = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, rows_of_a_share, ROWS):
        row = share * rows_of_a_share + start + tl.arange(0, ROWS)
        exists = (row < num_rows)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        mean = tl.load(means + row, row < num_rows, other=0)
        scale = tl.load(scales + row, row < num_rows, other=0)
        a = tl.load(grad_normalized + at, exists, other=0).to(tl.float32)
        unit = (tl.load(x + at, exists, other=0).to(tl.float32) - mean[:, None]) * scale[:, None]
        unit = tl.where(exists, unit, 0)
        grad_weight += a * unit
        grad_bias += a
        a *= w[None, :]
        along, level = tl.sum(a * unit, 1) / D, tl.sum(a, 1) / D
        tl.store(grad + at, scale[:, None] * (a - level[:, None] - unit * along[:, None]), exists)
    tl.store(weight_shares + share * D + column, tl.sum(grad_weight, 0), column < D)
    tl.store(bias_shares + share * D + column, tl.sum(grad_bias, 0), column < D)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows, and fp32 `[...]` the mean and the factor of each; of contiguous tensors."""
    D, (width, rows) = x.shape[-1], _tile(x.shape[-1])
    normalized = torch.empty_like(x)
    means, scales = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    num_rows = means.numel()
    arguments = (x, weight, bias, normalized, means, scales, eps, num_rows, D, width, rows)
    _layer_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](*arguments, num_warps=NUM_WARPS)
    return normalized, means, scales


def layer_norm_backward(
    grad_normalized: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x's gradient, and fp32 `[shares, D]` that sum to the weight's and to the bias's; of contiguous tensors."""
    D, num_rows, (width, rows) = x.shape[-1], means.numel(), _tile(x.shape[-1])
    rows_of_a_share = rows * triton.cdiv(triton.cdiv(num_rows, rows), SHARES)
    num_shares = triton.cdiv(num_rows, rows_of_a_share)
    grad = torch.empty_like(x)
    of_weight, of_bias = (x.new_empty(num_shares, D, dtype=torch.float32) for _ in range(2))
    arguments = (grad_normalized, x, weight, means, scales, grad, of_weight, of_bias, num_rows, rows_of_a_share)
    _layer_norm_bwd_kernel[(num_shares,)](*arguments, D, width, rows, num_warps=NUM_WARPS)
    return grad, of_weight, of_bias


def _tile(D: int) -> tuple[int, int]:
    """Columns, and rows at once."""
    width = triton.next_power_of_2(D)
    return width, min(MOST_ROWS, max(1, TILE // width))
