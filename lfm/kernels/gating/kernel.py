"""Triton kernels of LAERC's gate.

Of a norm's backward pass a program owns a share of the rows, and keeps their part of the parameters' gradients in
registers; the shares' parts are added in order by one reduction.  Shares depend on the number of rows alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARES = 264
TILE = 2048
"""Elements of each operand that a program has at once: as many whole rows as they hold."""
BLOCK, NUM_WARPS = 2048, 4


@triton.jit
def _joined_norm_fwd_kernel(
    x, y, log_scale, weight, bias, scaled, normalized, statistics, eps, num_rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < D
    exists = (row < num_rows) & inside
    factor = tl.exp(tl.load(log_scale).to(tl.float32))
    a = tl.load(x + row * D + column, exists, other=0).to(tl.float32)
    rounded = (factor * tl.load(y + row * D + column, exists, other=0).to(tl.float32)).to(scaled.dtype.element_ty)
    tl.store(scaled + row * D + column, rounded, exists)
    b = rounded.to(tl.float32)
    mean = (tl.sum(a, 1) + tl.sum(b, 1))[:, None] / (2 * D)
    a, b = tl.where(inside, a - mean, 0.0), tl.where(inside, b - mean, 0.0)
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / (2 * D) + eps)
    tl.store(statistics + row * 2, mean, row < num_rows)
    tl.store(statistics + row * 2 + 1, r, row < num_rows)
    for half in tl.static_range(2):
        w = tl.load(weight + half * D + column, inside, other=0).to(tl.float32)
        c = tl.load(bias + half * D + column, inside, other=0).to(tl.float32)
        part = a if half == 0 else b
        tl.store(normalized + row * (2 * D) + half * D + column, part * r * w + c, exists)


@triton.jit
def _joined_norm_bwd_kernel(
    grad_x, grad_scaled, grad, x, scaled, log_scale, weight, statistics, to_x, to_y, shares, num_rows, rows_of_a_share,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_X: tl.constexpr, HAS_SCALED: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < D
    factor = tl.exp(tl.load(log_scale).to(tl.float32))
    wa = tl.load(weight + column, inside, other=0).to(tl.float32)
    wb = tl.load(weight + D + column, inside, other=0).to(tl.float32)
    weight_a, weight_b = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    bias_a, bias_b, of_factor = (
        tl.zeros([WIDTH], tl.float32),
        tl.zeros([WIDTH], tl.float32),
        tl.zeros([WIDTH], tl.float32),
    )
    end = tl.minimum((share + 1) * rows_of_a_share, num_rows)
    for first in range(share * rows_of_a_share, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        exists = (row < end) & inside
        at, wide = row * D + column, row * (2 * D) + column
        mean = tl.load(statistics + row * 2, row < end, other=0)
        r = tl.load(statistics + row * 2 + 1, row < end, other=0)
        b = tl.load(scaled + at, exists, other=0).to(tl.float32)
        ua = tl.where(exists, tl.load(x + at, exists, other=0).to(tl.float32) - mean, 0.0) * r
        ub = tl.where(exists, b - mean, 0.0) * r
        ga = tl.load(grad + wide, exists, other=0).to(tl.float32)
        gb = tl.load(grad + wide + D, exists, other=0).to(tl.float32)
        weight_a += tl.sum(ga * ua, 0)
        weight_b += tl.sum(gb * ub, 0)
        bias_a += tl.sum(ga, 0)
        bias_b += tl.sum(gb, 0)
        ga, gb = ga * wa, gb * wb
        middle = (tl.sum(ga, 1) + tl.sum(gb, 1))[:, None] / (2 * D)
        along = (tl.sum(ga * ua, 1) + tl.sum(gb * ub, 1))[:, None] / (2 * D)
        da, db = r * (ga - middle - ua * along), r * (gb - middle - ub * along)
        if HAS_X:
            da += tl.load(grad_x + at, exists, other=0).to(tl.float32)
        if HAS_SCALED:
            db += tl.load(grad_scaled + at, exists, other=0).to(tl.float32)
        tl.store(to_x + at, da, exists)
        tl.store(to_y + at, factor * db, exists)
        of_factor += tl.sum(tl.where(exists, db * b, 0.0), 0)
    line, lane = shares + share * (4 * D + 1), tl.arange(0, WIDTH)
    tl.store(line + lane, weight_a, lane < D)
    tl.store(line + D + lane, weight_b, lane < D)
    tl.store(line + 2 * D + lane, bias_a, lane < D)
    tl.store(line + 3 * D + lane, bias_b, lane < D)
    tl.store(line + 4 * D, tl.sum(of_factor, 0))


@triton.jit
def _gated_fwd_kernel(logits, a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.sigmoid(tl.load(logits + i, i < n, other=0).to(tl.float32))
    x, y = tl.load(a + i, i < n, other=0).to(tl.float32), tl.load(b + i, i < n, other=0).to(tl.float32)
    tl.store(out + i, gate * x + (1 - gate) * y, i < n)


@triton.jit
def _gated_bwd_kernel(grad, logits, a, b, to_logits, to_a, to_b, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.sigmoid(tl.load(logits + i, i < n, other=0).to(tl.float32))
    x, y = tl.load(a + i, i < n, other=0).to(tl.float32), tl.load(b + i, i < n, other=0).to(tl.float32)
    g = tl.load(grad + i, i < n, other=0).to(tl.float32)
    tl.store(to_logits + i, g * (x - y) * gate * (1 - gate), i < n)
    tl.store(to_a + i, g * gate, i < n)
    tl.store(to_b + i, g * (1 - gate), i < n)


@triton.jit
def _scaled_sum_fwd_kernel(x, y, scale, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, i < n, other=0).to(tl.float32), tl.load(y + i, i < n, other=0).to(tl.float32)
    tl.store(out + i, a + tl.load(scale).to(tl.float32) * b, i < n)


@triton.jit
def _scaled_sum_bwd_kernel(grad, y, scale, to_y, shares, n, blocks_of_a_share, BLOCK: tl.constexpr):
    share = tl.program_id(0).to(tl.int64)
    factor, total = tl.load(scale).to(tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(blocks_of_a_share):
        i = (share * blocks_of_a_share + block) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + i, i < n, other=0).to(tl.float32)
        total += g * tl.load(y + i, i < n, other=0).to(tl.float32)
        tl.store(to_y + i, factor * g, i < n)
    tl.store(shares + share, tl.sum(total, 0))


def joined_norm_forward(
    x: Tensor, y: Tensor, log_scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled, normalized, and fp32 `[..., 2]` mean and factor of each row; of contiguous tensors."""
    D, num_rows = x.shape[-1], x.shape[:-1].numel()
    scaled, normalized = torch.empty_like(y), x.new_empty(*x.shape[:-1], 2 * D)
    statistics = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    width, rows = _tile(D)
    _joined_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        y,
        log_scale,
        weight,
        bias,
        scaled,
        normalized,
        statistics,
        eps,
        num_rows,
        D,
        width,
        rows,
        num_warps=NUM_WARPS,
    )
    return scaled, normalized, statistics


def joined_norm_backward(
    grad_x: Tensor | None,
    grad_scaled: Tensor | None,
    grad: Tensor,
    x: Tensor,
    scaled: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y, and fp32 `[shares, 4 D + 1]` that sum to those of weight, bias and log_scale; of contiguous
    tensors."""
    D, num_rows = x.shape[-1], x.shape[:-1].numel()
    width, rows = _tile(D)
    rows_of_a_share = triton.cdiv(triton.cdiv(num_rows, SHARES), rows) * rows
    num_shares = triton.cdiv(num_rows, rows_of_a_share)
    to_x, to_y = torch.empty_like(x), torch.empty_like(x)
    shares = x.new_empty(num_shares, 4 * D + 1, dtype=torch.float32)
    _joined_norm_bwd_kernel[(num_shares,)](
        grad if grad_x is None else grad_x, grad if grad_scaled is None else grad_scaled, grad, x, scaled, log_scale,
        weight, statistics, to_x, to_y, shares, num_rows, rows_of_a_share, D, width, rows,
        grad_x is not None, grad_scaled is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    return to_x, to_y, shares


def _tile(D: int) -> tuple[int, int]:
    width = triton.next_power_of_2(D)
    return width, max(1, TILE // width)


def gated_forward(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of contiguous tensors."""
    out, n = torch.empty_like(a), a.numel()
    _gated_fwd_kernel[(triton.cdiv(n, BLOCK),)](logits, a, b, out, n, BLOCK, num_warps=NUM_WARPS)
    return out


def gated_backward(grad: Tensor, logits: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of contiguous tensors."""
    out, n = [torch.empty_like(a) for _ in range(3)], a.numel()
    _gated_bwd_kernel[(triton.cdiv(n, BLOCK),)](grad, logits, a, b, *out, n, BLOCK, num_warps=NUM_WARPS)
    return out[0], out[1], out[2]


def scaled_sum_forward(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Of contiguous tensors."""
    out, n = torch.empty_like(x), x.numel()
    _scaled_sum_fwd_kernel[(triton.cdiv(n, BLOCK),)](x, y, scale, out, n, BLOCK, num_warps=NUM_WARPS)
    return out


def scaled_sum_backward(grad: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of y, and fp32 `[shares, 1]` that sum to that of scale; of contiguous tensors."""
    to_y, n = torch.empty_like(y), y.numel()
    blocks = triton.cdiv(triton.cdiv(n, BLOCK), SHARES)
    shares = y.new_empty(triton.cdiv(n, BLOCK * blocks), 1, dtype=torch.float32)
    _scaled_sum_bwd_kernel[(len(shares),)](grad, y, scale, to_y, shares, n, blocks, BLOCK, num_warps=NUM_WARPS)
    return to_y, shares
