"""Triton kernels of the in-place cross entropy, where a program owns one row (one pass finds its normalizer, one
writes), of its two passes over a shard of the vocabulary, and of scaling a gradient."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PER_LANE = 8
"""Neighbours that are one 16-byte load, and meet within their thread; two such loads a thread are in flight."""

SCALED_BLOCK, SCALED_WARPS = 4096, 8


LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
"""Exponentials are powers of two, which is what the hardware has; and a factor of log2 e goes into an FMA."""


@triton.jit
def _absorbed(top, total, x):
    """The running maximum of each lane, in fp32 and times log2 e, and the sum of exp(logit - maximum), after x."""
    new_top = tl.maximum(top, tl.max(x, 1) * LOG2_E)
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x * LOG2_E - new_top[:, None]), 1)


@triton.jit
def _logits_at(logits, bias, column, V, columns, BIASED: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr):
    """A tile in fp32, -inf behind V; WHOLE: none of it is behind V.  KEEP: it is read once more."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if WHOLE:
        x = tl.load(logits + column, eviction_policy=policy).to(tl.float32)
        if BIASED:
            x += tl.load(bias + column, eviction_policy="evict_last").to(tl.float32)
    else:
        x = tl.load(logits + column, column < columns, other=0, eviction_policy=policy).to(tl.float32)
        if BIASED:
            x += tl.load(bias + column, column < columns, other=0, eviction_policy="evict_last").to(tl.float32)
        x = tl.where(column < V, x, -float("inf"))
    return x


@triton.jit
def _top_and_sum(logits, bias, V, columns, BIASED: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    """The largest logit of a row times log2 e, and the sum of exp(logit - largest).

    Up to `columns` there is memory that may be read: where that is a multiple of 16, a load takes eight at once, though
    V be odd.
    """
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]  # [LANES, PER_LANE]
    # Every lane has its own running maximum and sum, so that no step waits for another lane.  It starts at a finite
    # maximum: a lane that sees no logit must not form inf - inf.
    top = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    whole = V // (LANES * PER_LANE)
    for tile in range(whole):
        column = tile * (LANES * PER_LANE) + lane
        top, total = _absorbed(top, total, _logits_at(logits, bias, column, V, columns, BIASED, True, True))
    if whole * (LANES * PER_LANE) < V:
        column = whole * (LANES * PER_LANE) + lane
        top, total = _absorbed(top, total, _logits_at(logits, bias, column, V, columns, BIASED, False, True))
    row_top = tl.max(top, 0)
    return row_top, tl.sum(total * tl.exp2(top - row_top), 0)


@triton.jit
def _write_gradient(
    logits, bias, V, columns, label, label_logit, log2_normalizer, weight,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr,
):  # fmt: skip
    """Over the logits of a row, and zeros behind them up to `columns`."""
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    # Backwards: what was read last is still in the cache, where what is written must not take its place.
    whole = V // (LANES * PER_LANE)
    if whole * (LANES * PER_LANE) < columns:
        column = whole * (LANES * PER_LANE) + lane
        x = _logits_at(logits, bias, column, V, columns, BIASED, False, False)
        grad = tl.exp2(x * LOG2_E - log2_normalizer)
        if WEIGHTED:
            grad *= weight
        tl.store(logits + column, grad, column < columns, eviction_policy="evict_first")
    for i in range(whole):
        column = (whole - 1 - i) * (LANES * PER_LANE) + lane
        x = _logits_at(logits, bias, column, V, columns, BIASED, True, False)
        grad = tl.exp2(x * LOG2_E - log2_normalizer)
        if WEIGHTED:
            grad *= weight
        tl.store(logits + column, grad, eviction_policy="evict_first")
    # The label's own once more, behind all that its program has written: no other column asks whether it is one.
    tl.debug_barrier()
    grad = tl.exp2(label_logit * LOG2_E - log2_normalizer) - 1
    if WEIGHTED:
        grad *= weight
    tl.store(logits + label, grad, (label >= 0) & (label < V))


@triton.jit
def _write_zeros(logits, columns, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    for tile in range(tl.cdiv(columns, LANES * PER_LANE)):
        column = tile * (LANES * PER_LANE) + tl.arange(0, LANES * PER_LANE)
        tl.store(logits + column, tl.zeros([LANES * PER_LANE], tl.float32), column < columns)


@triton.jit
def _cross_entropy_kernel(
    logits,
    bias,
    labels,
    token_weights,
    losses,
    stride,
    V,
    columns,
    GRADIENT: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    # Read before anything is written: the reductions below are barriers between this and the second pass.
    label_logit = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    if BIASED:
        label_logit += tl.load(bias + tl.maximum(label, 0)).to(tl.float32)
    top, total = _top_and_sum(logits, bias, V, columns, BIASED, LANES, PER_LANE)
    log2_normalizer = top + tl.log2(total)
    loss = log2_normalizer * LN_2 - label_logit
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(token_weights + row).to(tl.float32)
        loss *= weight
    tl.store(losses + row, tl.where(label >= 0, loss, 0.0))
    if GRADIENT:
        if label >= 0:
            _write_gradient(
                logits, bias, V, columns, label, label_logit, log2_normalizer, weight,
                BIASED, WEIGHTED, LANES, PER_LANE,
            )  # fmt: skip
        else:
            _write_zeros(logits, columns, LANES, PER_LANE)


@triton.jit
def _shard_sums_kernel(logits, labels, sums, stride, V, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    label_logit = tl.load(logits + label, (label >= 0) & (label < V), other=0.0).to(tl.float32)
    top, total = _top_and_sum(logits, logits, V, V, False, LANES, PER_LANE)
    tl.store(sums + row * 3, top * LN_2)
    tl.store(sums + row * 3 + 1, total)
    tl.store(sums + row * 3 + 2, label_logit)


@triton.jit
def _shard_gradient_kernel(
    logits, labels, log_normalizers, factors, stride, V, LANES: tl.constexpr, PER_LANE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor, log2_normalizer = tl.load(factors + row).to(tl.float32), tl.load(log_normalizers + row) * LOG2_E
    label = tl.load(labels + row).to(tl.int32)
    logits += row * stride
    if factor != 0:
        label_logit = tl.load(logits + label, (label >= 0) & (label < V), other=0.0).to(tl.float32)
        # Read by all before any of them writes.
        tl.debug_barrier()
        _write_gradient(logits, logits, V, V, label, label_logit, log2_normalizer, factor, False, True, LANES, PER_LANE)
    else:
        _write_zeros(logits, V, LANES, PER_LANE)


def cross_entropy_kernel_(
    logits: Tensor,
    labels: Tensor,
    gradient: bool,
    token_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    padding: int = 0,
) -> Tensor:
    """As `op.cross_entropy_`; logits with any row stride."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        weighted = token_weights is not None
        weights = token_weights.contiguous() if weighted else losses  # not read
        sizes = (logits.stride(0), V, V + padding)
        added = logits if bias is None else F.pad(bias, (0, padding)).contiguous()
        rows = (logits, added, labels.contiguous(), weights, losses)
        arguments = (*rows, *sizes, gradient, bias is not None, weighted)
        lanes, warps = _lanes(V)
        _cross_entropy_kernel[(n,)](*arguments, lanes, PER_LANE, num_warps=warps)
    return losses


def shard_sums_kernel(logits: Tensor, labels: Tensor) -> Tensor:
    """As `op.shard_sums`; logits with any row stride."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    n, V = logits.shape
    sums = torch.empty(n, 3, dtype=torch.float32, device=logits.device)
    if n:
        lanes, warps = _lanes(V)
        arguments = (logits, labels.contiguous(), sums, logits.stride(0), V)
        _shard_sums_kernel[(n,)](*arguments, lanes, PER_LANE, num_warps=warps)
    return sums


def shard_gradient_kernel_(logits: Tensor, labels: Tensor, log_normalizer: Tensor, factors: Tensor) -> None:
    """As `op.shard_gradient_`; logits with any row stride."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    n, V = logits.shape
    if n:
        lanes, warps = _lanes(V)
        rows = (labels.contiguous(), log_normalizer.contiguous(), factors.contiguous())
        _shard_gradient_kernel[(n,)](logits, *rows, logits.stride(0), V, lanes, PER_LANE, num_warps=warps)


def _lanes(V: int) -> tuple[int, int]:
    """Lanes and warps: of a short row several programs share a multiprocessor."""
    return (2048, 32) if V >= 32_768 else (512, 8)


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
