"""Triton kernels of the in-place cross entropy, where a program owns one row (one pass finds its normalizer, one
writes), and of scaling a gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, PER_LANE, NUM_WARPS = 2048, 8, 32
"""Eight neighbours are one 16-byte load, and meet within their thread; two such loads a thread are in flight."""

SCALED_BLOCK, SCALED_WARPS = 4096, 8


@triton.jit
def _cross_entropy_kernel(
    logits,
    labels,
    token_weights,
    losses,
    stride,
    V,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    # Read before anything is written: the reductions below are barriers between this and the second pass.
    label_logit = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]  # [LANES, PER_LANE]
    num_tiles = tl.cdiv(V, LANES * PER_LANE)

    # Every lane has its own running maximum and sum, so that no step waits for another lane.  It starts at a finite
    # maximum: a lane that sees no logit must not form inf - inf.
    top = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for tile in range(num_tiles):
        column = tile * (LANES * PER_LANE) + lane
        x = tl.load(logits + column, column < V, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top[:, None]), 1)
        top = new_top
    row_top = tl.max(top, 0)
    log_normalizer = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    kept = label >= 0
    loss = log_normalizer - label_logit
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(token_weights + row).to(tl.float32)
        loss *= weight
    tl.store(losses + row, tl.where(kept, loss, 0.0))

    if GRADIENT:
        for i in range(num_tiles):
            # Backwards: what was read last is still in the cache, where what is written must not take its place.
            column = (num_tiles - 1 - i) * (LANES * PER_LANE) + lane
            x = tl.load(logits + column, column < V, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            softmax = tl.exp(x - log_normalizer)
            grad = tl.where(column == label, softmax - 1, softmax)
            if WEIGHTED:
                grad *= weight
            tl.store(logits + column, tl.where(kept, grad, 0.0), column < V, eviction_policy="evict_first")


def cross_entropy_kernel_(
    logits: Tensor, labels: Tensor, gradient: bool, token_weights: Tensor | None = None
) -> Tensor:
    """As `op.cross_entropy_`; logits with any row stride."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        weighted = token_weights is not None
        weights = token_weights.contiguous() if weighted else losses  # not read
        arguments = (logits, labels.contiguous(), weights, losses, logits.stride(0), V, gradient, weighted)
        _cross_entropy_kernel[(n,)](*arguments, LANES, PER_LANE, num_warps=NUM_WARPS)
    return losses


@triton.jit
def _scaled_kernel(x, factor, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n).to(tl.float32) * tl.load(factor).to(tl.float32), i < n)


def scaled_kernel(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `op.scaled`, of a contiguous x."""
    out, n = torch.empty_like(x, dtype=dtype), x.numel()
    if n:
        _scaled_kernel[(triton.cdiv(n, SCALED_BLOCK),)](x, factor, out, n, SCALED_BLOCK, num_warps=SCALED_WARPS)
    return out
