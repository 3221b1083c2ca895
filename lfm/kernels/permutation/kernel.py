"""Triton kernels of the moves around a mixture of experts.

dispatch, combine: a program owns BLOCK columns of one token, and reads or writes that part of all its k rows.
backward of combine: a program owns one token, since a weight's gradient is a product of whole rows.
counting sort: a program owns BLOCK keys; the first kernel counts them by key, the second ranks them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 1024, 4
SORT_TILE = 4096
"""Keys of a program times values that they are compared with."""


@triton.jit
def _dispatch_fwd_kernel(x, place, rows, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    num_column_blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_column_blocks) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + token * D + column, column < D)
    for i in tl.static_range(K):
        row = tl.load(place + token * K + i)
        tl.store(rows + row * D + column, values, column < D)


@triton.jit
def _combine_fwd_kernel(
    rows, place, weights, out, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    num_column_blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_column_blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(K):
        row = tl.load(place + token * K + i)
        values = tl.load(rows + row * D + column, column < D, other=0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + token * K + i).to(tl.float32)
        total += values
    tl.store(out + token * D + column, total, column < D)


@triton.jit
def _combine_bwd_kernel(
    grad, rows, place, weights, grad_rows, grad_weights, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(K):
        row = tl.load(place + token * K + i)
        weight = tl.load(weights + token * K + i).to(tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in tl.static_range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            g = tl.load(grad + token * D + column, column < D, other=0).to(tl.float32)  # from L1 after the first i
            products += g * tl.load(rows + row * D + column, column < D, other=0).to(tl.float32)
            tl.store(grad_rows + row * D + column, g * weight, column < D)
        tl.store(grad_weights + token * K + i, tl.sum(products, 0))


@triton.jit
def _count_kernel(keys, counts, m, num_blocks, num_keys, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    index, value = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, KEYS)
    key = tl.load(keys + index, index < m, other=-1)
    same = (key[:, None] == value[None, :]).to(tl.int32)  # [BLOCK, KEYS]
    tl.store(counts + value * num_blocks + block, tl.sum(same, 0), value < num_keys)


@triton.jit
def _rank_kernel(keys, counts, ends, place, m, num_blocks, num_keys, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    index, value = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, KEYS)
    key = tl.load(keys + index, index < m, other=-1)
    same = (key[:, None] == value[None, :]).to(tl.int32)  # [BLOCK, KEYS]
    # Rows of smaller keys, and of this key in blocks before.
    at = value * num_blocks + block
    start = tl.load(ends + at, value < num_keys, other=0) - tl.load(counts + at, value < num_keys, other=0)
    rank = tl.cumsum(same, 0) - 1
    found = tl.sum(same * (rank + start[None, :].to(tl.int32)), 1)
    tl.store(place + index, found.to(tl.int64), index < m)


def counting_sort(keys: Tensor, num_keys: int) -> Tensor:
    """`keys [m]`, contiguous, m < 2^31 -> int64 `[m]`: the place of each in a stable sort."""
    m, width = len(keys), triton.next_power_of_2(num_keys)
    place = torch.empty(m, dtype=torch.int64, device=keys.device)
    if m == 0:
        return place
    block = max(16, SORT_TILE // width)
    num_blocks = triton.cdiv(m, block)
    counts = torch.empty(num_keys, num_blocks, dtype=torch.int32, device=keys.device)
    _count_kernel[(num_blocks,)](keys, counts, m, num_blocks, num_keys, width, block, num_warps=NUM_WARPS)
    ends = counts.flatten().cumsum(0)
    _rank_kernel[(num_blocks,)](keys, counts, ends, place, m, num_blocks, num_keys, width, block, num_warps=NUM_WARPS)
    return place


def dispatch_forward(x: Tensor, place: Tensor) -> Tensor:
    """As `op.dispatch`, of contiguous tensors."""
    (n, k), D = place.shape, x.shape[1]
    rows = x.new_empty(n * k, D)
    if rows.numel():
        block = _block(D)
        _dispatch_fwd_kernel[(n * triton.cdiv(D, block),)](x, place, rows, D, k, block, num_warps=NUM_WARPS)
    return rows


def combine_forward(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """As `op.combine`, of contiguous tensors."""
    (n, k), D = place.shape, rows.shape[1]
    out = rows.new_empty(n, D)
    if out.numel():
        block, weighted = _block(D), weights is not None
        grid = (n * triton.cdiv(D, block),)
        _combine_fwd_kernel[grid](rows, place, weights, out, D, k, block, weighted, num_warps=NUM_WARPS)
    return out


def combine_backward(grad: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights, from contiguous tensors."""
    (n, k), D = place.shape, rows.shape[1]
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if n:
        arguments = (grad, rows, place, weights, grad_rows, grad_weights)
        _combine_bwd_kernel[(n,)](*arguments, D, k, _block(D), num_warps=NUM_WARPS)
    return grad_rows, grad_weights


def _block(D: int) -> int:
    return min(BLOCK, triton.next_power_of_2(D))
