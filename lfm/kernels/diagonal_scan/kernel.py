"""Triton kernels of the diagonal gated scan, forward and backward, each one pass over memory.

A program owns BLOCK channels of one sequence.  It takes time in tiles of SEGMENTS x LENGTH positions: lane (s, d)
loads the LENGTH positions of segment s of channel d, folds them to one map h -> decay h + total, learns the state
before its segment from the folds of the segments before, and walks through its positions again, in registers.  Short
sequences are walked tile by tile by one program.  In long ones every tile has a program of its own, which publishes
its fold and waits for those of the tiles before; tiles are handed out in order, so a wait always ends.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_WALK = 1024
"""Positions of a sequence that one program walks; longer ones are chained."""


@dataclass(frozen=True)
class Tiling:
    """How a launch cuts its work.

    A walk of one segment takes every channel through time step by step, so that its bits do not depend on the tiling,
    which may follow the batch size.  A chain's do: it must not.
    """

    segments: int
    length: int
    block: int
    num_warps: int
    chained: bool
    prefetch: bool = False
    group: int = 8
    """Tiles of a chain whose folds a program combines by itself; the last of a group publishes the state after it."""


FEW_WARPS = 1024
"""Walks of 64 channels that leave an H200 idle: there, a warp takes 32."""


def forward_tiling(batch: int, num_positions: int, num_channels: int) -> Tiling:
    if num_positions > LONGEST_WALK:
        return Tiling(8, 16, 64, 8, True)
    if batch * num_channels < 64 * FEW_WARPS:
        return Tiling(1, 32, 32, 1, False, prefetch=True)
    return Tiling(1, 16, 64, 1, False, prefetch=True)


def backward_tiling(batch: int, num_positions: int, num_channels: int) -> Tiling:
    if num_positions > LONGEST_WALK:
        return Tiling(8, 8, 64, 8, True)
    return Tiling(1, 8, 32 if batch * num_channels < 64 * FEW_WARPS else 64, 1, False)


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    if PTX:  # tl.exp2 spends five instructions on subnormal results
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _gates(x, offset, u, PTX: tl.constexpr):
    """sigmoid(y), sigmoid(-y) and tanh(u), where y is x plus the bias and offset is the bias times -log2(e).

    One division serves both; the bounds, at y = -60 and u = -13, keep its divisor finite.  Beyond them sigmoid(y) is 0
    and tanh(u) is -1 to fp32's precision.  NaN stays NaN.
    """
    e = _exp2(tl.minimum(x * -1.4426950408889634 + offset, 86.5, propagate_nan=tl.PropagateNan.ALL), PTX)
    q = _exp2(tl.minimum(u * -2.8853900817779268, 37.5, propagate_nan=tl.PropagateNan.ALL), PTX)
    both = _reciprocal((1.0 + e) * (1.0 + q), PTX)
    rise = both * (1.0 + q)
    return rise, e * rise, 2.0 * (both * (1.0 + e)) - 1.0


@triton.jit
def _load_rows(at, step, mask, t, T, direction, RAGGED: tl.constexpr, LENGTH: tl.constexpr):
    """LENGTH tensors: of the pointers `at`, which are at position t, and of the positions after in scan order."""
    rows = ()
    for i in tl.static_range(LENGTH):
        here = mask
        if RAGGED:
            here = mask & (t + i * direction < T) & (t + i * direction >= 0)
        rows += (tl.load(at + i * step, mask=here, other=0.0),)
    return rows


@triton.jit
def _then(decay, total, next_decay, next_total):
    return decay * next_decay, next_decay * total + next_total


@triton.jit
def _then_exclusive(decay, total, own_decay, own_total, next_decay, next_total, next_own_decay, next_own_total):
    """`_then` of all but the last map; the last map is kept beside it."""
    decay, total = _then(decay, total, own_decay, own_total)
    decay, total = _then(decay, total, next_decay, next_total)
    return decay, total, next_own_decay, next_own_total


@triton.jit
def _claim(counter, num_columns, num_tiles, CHAINED: tl.constexpr):
    """First tile, end and column of this program: a ticket takes all columns of a tile before the next tile."""
    if CHAINED:
        ticket = tl.atomic_add(counter, 1)
        return ticket // num_columns, ticket // num_columns + 1, ticket % num_columns
    else:
        return 0, num_tiles, tl.program_id(0)


@triton.jit
def _publish(flag, word):
    """Set `flag` after everything that this program has stored."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, word, sem="release")


@triton.jit
def _carry_before(start, folds, group_ends, flags, tile, D, d, GROUP: tl.constexpr):
    """The state `[BLOCK]` before `tile`, from the tiles of its group that came before and the state before the group.

    folds `[tiles, 2, D]`, group_ends `[groups, D]` and flags `[tiles]` are of this sequence; `start` is before tile 0.
    """
    first = tile // GROUP * GROUP
    k = tl.arange(0, GROUP)
    present = first + k < tile
    missing = 1
    while missing > 0:
        seen = tl.atomic_add(flags + first + k, 0, mask=present, sem="acquire")
        missing = tl.sum((present & (seen == 0)).to(tl.int32))
    if first > 0:
        word = 0
        while word < 2:
            word = tl.atomic_add(flags + first - 1, 0, sem="acquire")
    tl.debug_barrier()
    if first > 0:
        start = tl.load(group_ends + (first // GROUP - 1) * D + d, mask=d < D, other=0.0, cache_modifier=".cg")
    # One position of the group at a time: a load of all as a matrix would impose its layout on everything else.
    decays, totals = (), ()
    for k in tl.static_range(GROUP - 1):
        at, mask = folds + (first + k) * (2 * D) + d, (d < D) & (d * 0 + first + k < tile)
        decays += (tl.load(at, mask=mask, other=1.0, cache_modifier=".cg"),)
        totals += (tl.load(at + D, mask=mask, other=0.0, cache_modifier=".cg"),)
    for k in tl.static_range(GROUP - 1):
        start = decays[k] * start + totals[k]
    return start


@triton.jit
def _join(
    decay, total, start, folds, group_ends, flags, tile, D, d,
    GROUP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the folds `[SEGMENTS, BLOCK]` of a tile of a chain: the state before each segment; `start` is before tile 0.

    Tells the tiles after it of its fold, and is the only one to hand on a state if it is the last of its group.
    """
    s = tl.arange(0, SEGMENTS)[:, None]
    one, zero = tl.full([SEGMENTS, BLOCK], 1.0, tl.float32), tl.zeros([SEGMENTS, BLOCK], tl.float32)
    before_decay, before_total, _, _ = tl.associative_scan((one, zero, decay, total), 0, _then_exclusive)
    all_decay, all_total = _then(before_decay, before_total, decay, total)
    tile_decay = tl.sum(tl.where(s == SEGMENTS - 1, all_decay, 0.0), 0)  # [BLOCK]
    tile_total = tl.sum(tl.where(s == SEGMENTS - 1, all_total, 0.0), 0)
    tl.store(folds + tile * 2 * D + d, tile_decay, mask=d < D)
    tl.store(folds + tile * 2 * D + D + d, tile_total, mask=d < D)
    _publish(flags + tile, 1)
    carry = _carry_before(start, folds, group_ends, flags, tile, D, d, GROUP)
    if tile % GROUP == GROUP - 1:
        tl.store(group_ends + tile // GROUP * D + d, tile_decay * carry + tile_total, mask=d < D)
        _publish(flags + tile, 2)
    return before_decay * carry[None, :] + before_total


@triton.jit
def _diagonal_scan_fwd_kernel(
    gate, bias, value, state, reset, h, final, folds, group_ends, flags, counter,
    T, num_columns, gate_row, value_row, largest_alpha, smallest_gain,
    D: tl.constexpr, gate_step: tl.constexpr, value_step: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, RAGGED: tl.constexpr, CHAINED: tl.constexpr,
    GROUP: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = SEGMENTS * LENGTH
    num_tiles = tl.cdiv(T, TILE)
    first_tile, end_tile, column = _claim(counter, num_columns, num_tiles, CHAINED)
    num_blocks = tl.cdiv(D, BLOCK)
    b = (column // num_blocks).to(tl.int64)
    d = column % num_blocks * BLOCK + tl.arange(0, BLOCK)
    in_range = (d < D)[None, :]
    t = first_tile * TILE + tl.arange(0, SEGMENTS)[:, None] * LENGTH  # of each lane's first row
    gate += b * gate_row
    value += b * value_row
    h += b * T * D
    reset += b * T
    folds += b * num_tiles * 2 * D
    group_ends += b * (num_tiles // GROUP) * D
    flags += column.to(tl.int64) * num_tiles

    offset = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :] * -1.4426950408889634
    start = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        start = tl.load(state + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.broadcast_to(start[None, :], [SEGMENTS, BLOCK])
    if PREFETCH:
        row = t.to(tl.int64)
        xs = _load_rows(gate + row * gate_step + d[None, :], gate_step, in_range, t, T, 1, RAGGED, LENGTH)
        us = _load_rows(value + row * value_step + d[None, :], value_step, in_range, t, T, 1, RAGGED, LENGTH)
    for tile in range(first_tile, end_tile):
        # With prefetch the next tile comes in while this one is computed; the last one again, in vain.
        load_t = tl.minimum(t + TILE, (num_tiles - 1) * TILE) if PREFETCH else t
        row = load_t.to(tl.int64)
        next_xs = _load_rows(gate + row * gate_step + d[None, :], gate_step, in_range, load_t, T, 1, RAGGED, LENGTH)
        next_us = _load_rows(value + row * value_step + d[None, :], value_step, in_range, load_t, T, 1, RAGGED, LENGTH)
        if not PREFETCH:
            xs = next_xs
            us = next_us
        resets = ()
        if HAS_RESET:
            resets = _load_rows(reset + t, 1, t >= 0, t, T, 1, RAGGED, LENGTH)
        gains, vs = (), ()
        for i in tl.static_range(LENGTH):
            rise, _, v = _gates(xs[i].to(tl.float32), offset, us[i].to(tl.float32), PTX)
            gain = smallest_gain + largest_alpha * rise
            if RAGGED:
                gain = tl.where(t + i < T, gain, 0.0)
            gains += (gain,)
            vs += (v,)
        # In terms of gain: alpha near 1 has lost the digits of 1 - alpha.
        if CHAINED:
            decay = tl.full([SEGMENTS, BLOCK], 1.0, tl.float32)
            total = tl.zeros([SEGMENTS, BLOCK], tl.float32)
            for i in tl.static_range(LENGTH):
                if HAS_RESET:
                    decay = tl.where(resets[i] != 0, 0.0, decay)
                    total = tl.where(resets[i] != 0, 0.0, total)
                decay -= gains[i] * decay
                total += gains[i] * (vs[i] - total)
            x = _join(decay, total, start, folds, group_ends, flags, tile, D, d, GROUP, SEGMENTS, BLOCK)
        at = h + t.to(tl.int64) * D + d[None, :]
        for i in tl.static_range(LENGTH):
            if HAS_RESET:
                x = tl.where(resets[i] != 0, 0.0, x)
            x += gains[i] * (vs[i] - x)
            mask = in_range
            if RAGGED:
                mask = mask & (t + i < T)
            tl.store(at + i * D, x.to(h.dtype.element_ty), mask=mask)
        if PREFETCH:
            xs = next_xs
            us = next_us
        t += TILE

    if end_tile == num_tiles:
        last = tl.arange(0, SEGMENTS)[:, None] == SEGMENTS - 1
        tl.store(final + b * D + d[None, :] + tl.zeros([SEGMENTS, BLOCK], tl.int32), x, mask=last & in_range)


@triton.jit
def _diagonal_scan_bwd_kernel(
    gate, bias, value, state, reset, h, grad_h, grad_final, grad_gate, grad_bias, grad_value, grad_state,
    folds, group_ends, flags, counter,
    T, num_columns, gate_row, value_row, grad_row, largest_alpha, smallest_gain,
    D: tl.constexpr, gate_step: tl.constexpr, value_step: tl.constexpr, grad_step: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, RAGGED: tl.constexpr, CHAINED: tl.constexpr,
    GROUP: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Time runs down: tile 0 ends with position T - 1.  What is carried is the gradient of the state carried over."""
    TILE: tl.constexpr = SEGMENTS * LENGTH
    num_tiles = tl.cdiv(T, TILE)
    first_tile, end_tile, column = _claim(counter, num_columns, num_tiles, CHAINED)
    num_blocks = tl.cdiv(D, BLOCK)
    b = (column // num_blocks).to(tl.int64)
    d = column % num_blocks * BLOCK + tl.arange(0, BLOCK)
    in_range = (d < D)[None, :]
    t = T - 1 - first_tile * TILE - tl.arange(0, SEGMENTS)[:, None] * LENGTH  # of each lane's first row
    gate += b * gate_row
    value += b * value_row
    grad_h += b * grad_row
    h += b * T * D
    grad_gate += b * T * D
    grad_value += b * T * D
    reset += b * T
    folds += b * num_tiles * 2 * D
    group_ends += b * (num_tiles // GROUP) * D
    flags += column.to(tl.int64) * num_tiles

    offset = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :] * -1.4426950408889634
    initial = tl.zeros([1, BLOCK], tl.float32)
    if HAS_STATE:
        initial = tl.load(state + b * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    start = tl.load(grad_final + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    grad = tl.broadcast_to(start[None, :], [SEGMENTS, BLOCK])
    bias_sum = tl.zeros([SEGMENTS, BLOCK], tl.float32)

    for tile in range(first_tile, end_tile):
        row = t.to(tl.int64)
        at = row * D + d[None, :]  # in h and both gradients, which are contiguous
        xs = _load_rows(gate + row * gate_step + d[None, :], -gate_step, in_range, t, T, -1, RAGGED, LENGTH)
        us = _load_rows(value + row * value_step + d[None, :], -value_step, in_range, t, T, -1, RAGGED, LENGTH)
        rs = _load_rows(grad_h + row * grad_step + d[None, :], -grad_step, in_range, t, T, -1, RAGGED, LENGTH)
        hs = _load_rows(h + at - D, -D, in_range, t - 1, T, -1, True, LENGTH)
        resets = ()
        if HAS_RESET:
            resets = _load_rows(reset + t, -1, t < T, t, T, -1, RAGGED, LENGTH)
        gains, slopes, pushes = (), (), ()
        for i in tl.static_range(LENGTH):
            rise, fall, v = _gates(xs[i].to(tl.float32), offset, us[i].to(tl.float32), PTX)
            gain = smallest_gain + largest_alpha * rise
            received = hs[i].to(tl.float32)
            if HAS_STATE:
                received = tl.where(t == i, initial, received)
            if HAS_RESET:
                received = tl.where(resets[i] != 0, 0.0, received)
            slope = (largest_alpha * fall) * (rise * (v - received))
            if RAGGED:
                gain = tl.where(t >= i, gain, 0.0)
                slope = tl.where(t >= i, slope, 0.0)
            gains += (gain,)
            slopes += (slope,)
            pushes += (gain * (1.0 - v * v),)
        if CHAINED:
            decay = tl.full([SEGMENTS, BLOCK], 1.0, tl.float32)
            total = tl.zeros([SEGMENTS, BLOCK], tl.float32)
            for i in tl.static_range(LENGTH):
                decay -= gains[i] * decay
                total += rs[i].to(tl.float32)
                total -= gains[i] * total
                if HAS_RESET:
                    decay = tl.where(resets[i] != 0, 0.0, decay)
                    total = tl.where(resets[i] != 0, 0.0, total)
            grad = _join(decay, total, start, folds, group_ends, flags, tile, D, d, GROUP, SEGMENTS, BLOCK)
        for i in tl.static_range(LENGTH):
            grad += rs[i].to(tl.float32)
            change = grad * slopes[i]
            bias_sum += change
            mask = in_range
            if RAGGED:
                mask = mask & (t >= i)
            tl.store(grad_gate + at - i * D, change.to(grad_gate.dtype.element_ty), mask=mask)
            tl.store(grad_value + at - i * D, (grad * pushes[i]).to(grad_value.dtype.element_ty), mask=mask)
            grad -= gains[i] * grad
            if HAS_RESET:
                grad = tl.where(resets[i] != 0, 0.0, grad)
        t -= TILE

    part = b
    if CHAINED:
        part = b * num_tiles + first_tile
    tl.store(grad_bias + part * D + d, tl.sum(bias_sum, 0), mask=d < D)
    if end_tile == num_tiles:
        last = tl.arange(0, SEGMENTS)[:, None] == SEGMENTS - 1
        tl.store(grad_state + b * D + d[None, :] + tl.zeros([SEGMENTS, BLOCK], tl.int32), grad, mask=last & in_range)


def forward(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    delta_min: float,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked.forward`, without float64."""
    B, T, D = value.shape
    tiling = tiling or forward_tiling(B, T, D)
    gate, value = _rows(gate), _rows(value)
    h = torch.empty((B, T, D), dtype=value.dtype, device=value.device)
    final = torch.empty((B, D), dtype=torch.float32, device=value.device)
    grid, chain, cut = _launch(value, tiling)
    _diagonal_scan_fwd_kernel[grid](
        gate, bias, value, _or(state, final), _or(reset, final), h, final, *chain,
        T, B * -(-D // tiling.block), gate.stride(0), value.stride(0), math.exp(-delta_min), -math.expm1(-delta_min),
        D, gate.stride(1), value.stride(1), tiling.prefetch, state is not None, reset is not None, **cut,
    )  # fmt: skip
    return h, final


def backward(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    h: Tensor,
    grad_h: Tensor,
    grad_final: Tensor,
    delta_min: float,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.backward`, without float64."""
    B, T, D = value.shape
    tiling = tiling or backward_tiling(B, T, D)
    gate, value, grad_h = _rows(gate), _rows(value), _rows(grad_h)
    grad_gate, grad_value = (torch.empty((B, T, D), dtype=t.dtype, device=t.device) for t in (gate, value))
    num_parts = B * -(-T // (tiling.segments * tiling.length)) if tiling.chained else B
    grad_bias = torch.empty((num_parts, D), dtype=torch.float32, device=value.device)
    grad_state = torch.empty((B, D), dtype=torch.float32, device=value.device)
    grid, chain, cut = _launch(value, tiling)
    _diagonal_scan_bwd_kernel[grid](
        gate, bias, value, _or(state, grad_state), _or(reset, grad_state), h, grad_h, grad_final.contiguous(),
        grad_gate, grad_bias, grad_value, grad_state, *chain,
        T, B * -(-D // tiling.block), gate.stride(0), value.stride(0), grad_h.stride(0),
        math.exp(-delta_min), -math.expm1(-delta_min),
        D, gate.stride(1), value.stride(1), grad_h.stride(1), state is not None, reset is not None, **cut,
    )  # fmt: skip
    return grad_gate, grad_bias.sum(0), grad_value, grad_state


def _launch(like: Tensor, tiling: Tiling) -> tuple[tuple[int], tuple[Tensor, ...], dict[str, int | bool]]:
    """Grid; folds, states after groups, flags and ticket counter of a chain; and the compile-time arguments."""
    B, T, D = like.shape
    num_tiles, num_columns = -(-T // (tiling.segments * tiling.length)), B * -(-D // tiling.block)
    if tiling.chained:
        words = torch.zeros(num_columns * num_tiles + 1, dtype=torch.int32, device=like.device)
        folds = torch.empty(B * num_tiles * 2 * D, dtype=torch.float32, device=like.device)
        group_ends = torch.empty(B * (num_tiles // tiling.group) * D, dtype=torch.float32, device=like.device)
        chain = (folds, group_ends, words[1:], words)
    else:
        chain = (like,) * 4  # not looked at
    cut = {
        "RAGGED": T % (tiling.segments * tiling.length) != 0,
        "CHAINED": tiling.chained,
        "GROUP": tiling.group,
        "SEGMENTS": tiling.segments,
        "LENGTH": tiling.length,
        "BLOCK": tiling.block,
        "PTX": like.is_cuda,
        "num_warps": tiling.num_warps,
    }
    return (num_columns * num_tiles if tiling.chained else num_columns,), chain, cut


def _rows(tensor: Tensor) -> Tensor:
    """With contiguous channels; the rows of a wider tensor may stay where they are."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an input that is not there and not looked at."""
    return other if tensor is None else tensor
