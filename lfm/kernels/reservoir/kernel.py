"""Triton kernels of the chunked recurrence: one launch is one step of all chunks, forward or backward.

A program owns a tile of one reservoir, rows x units, where the B*C rows are chunks of sequences.  It multiplies its
rows, with all units as the step before left them, and does the rest of the step for its own units; the launch boundary
is the barrier.  Carried states are fp32 `[R, B, C, N]`, dense; all else is a view `[R, B, C, N]`, mostly of a tensor
`[B, T, R, N]`, whose strides over reservoirs, sequences and chunks are given.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfm.kernels.reservoir.grid import ROW_COUNTS, row_count

COUNTS = ("num_rows", "num_chunks", "reset_b", "reset_c")
"""Arguments whose values make no difference to the code: one compilation serves all batches."""


class Tile(NamedTuple):
    rows: int
    units: int
    depth: int
    """Units of two bytes multiplied at a time, half of four; `stages - 1` such blocks are on their way at once."""
    stages: int
    num_warps: int


_MEASURED = Tile(16, 32, 128, 5, 4), Tile(32, 32, 128, 5, 4), Tile(64, 32, 128, 5, 4), Tile(64, 64, 64, 5, 4)
TILES = dict(zip(ROW_COUNTS, _MEASURED, strict=True))
"""By the number of rows of a reservoir: few rows want many small programs."""


@triton.jit
def _tile(num_rows, num_chunks, N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr):
    """Reservoir; rows, their sequences and their chunks `[rows, 1]`; units `[1, units]`; which of the tile exist."""
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    unit = (tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS))[None, :]
    exists = (row < num_rows) & (unit < N)
    return tl.program_id(2).to(tl.int64), row, (row // num_chunks).to(tl.int64), row % num_chunks, unit, exists


@triton.jit
def _starts(reset, sequence, chunk, reset_b, reset_c, row_exists):
    """Whether a document starts at each row."""
    return tl.load(reset + sequence * reset_b + chunk * reset_c, row_exists, other=0) != 0


@triton.jit
def _product(
    x, weight, row_exists, unit, N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 `[rows, units]`: sum over k of x[row, k] weight[k, unit].  `x [rows, 1]` points to the rows."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], tl.float32)
    for first in tl.range(0, N, BLOCK_DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_DEPTH)
        w = tl.load(weight + k[:, None] * N + unit, (k[:, None] < N) & (unit < N), other=0)
        rows = tl.load(x + k[None, :], row_exists & (k[None, :] < N), other=0)
        total = tl.dot(rows, w, total, input_precision="ieee")
    return total


@triton.jit
def _tanh(z):
    """To fp32's precision near zero as well, where the quotient has lost its digits."""
    falling = tl.exp(-2.0 * tl.abs(z))
    quotient = (1.0 - falling) / (1.0 + falling)
    square = z * z
    series = z * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.2, series, tl.where(z < 0, -quotient, quotient))


@triton.jit(do_not_specialize=COUNTS)
def _reservoir_fwd_kernel(
    carry, state, weight, drive, reset, next_carry, next_state, gain, leak_rate, num_rows, num_chunks,
    state_r, state_b, state_c, drive_r, drive_b, drive_c, reset_b, reset_c, next_r, next_b, next_c,
    N: tl.constexpr, HAS_RESET: tl.constexpr, WITH_GAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    reservoir, row, sequence, chunk, unit, exists = _tile(num_rows, num_chunks, N, BLOCK_ROWS, BLOCK_UNITS)
    at = (reservoir * num_rows + row) * N + unit
    received = tl.load(carry + at, exists, other=0)
    driven = tl.load(drive + reservoir * drive_r + sequence * drive_b + chunk * drive_c + unit, exists, other=0)
    x = state + reservoir * state_r + sequence * state_b + chunk * state_c
    w = weight + reservoir * N * N
    multiplied = _product(x, w, row < num_rows, unit, N, BLOCK_ROWS, BLOCK_UNITS, BLOCK_DEPTH, STAGES)
    if HAS_RESET:
        starts = _starts(reset, sequence, chunk, reset_b, reset_c, row < num_rows)
        received, multiplied = tl.where(starts, 0.0, received), tl.where(starts, 0.0, multiplied)
    squashed = _tanh(multiplied + driven.to(tl.float32))
    result = received + leak_rate * (squashed - received)
    tl.store(next_carry + at, result, exists)
    slot = reservoir * next_r + sequence * next_b + chunk * next_c + unit
    tl.store(next_state + slot, result, exists)
    if WITH_GAIN:
        tl.store(gain + slot, 1.0 - squashed * squashed, exists)


@triton.jit(do_not_specialize=COUNTS)
def _reservoir_bwd_kernel(
    carry, delta, weight, grad, reset, next_carry, next_grad, next_gain, next_delta, leak_rate, num_rows, num_chunks,
    delta_r, delta_b, delta_c, grad_r, grad_b, grad_c, reset_b, reset_c, next_r, next_b, next_c,
    N: tl.constexpr, HAS_RESET: tl.constexpr, HAS_NEXT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    reservoir, row, sequence, chunk, unit, exists = _tile(num_rows, num_chunks, N, BLOCK_ROWS, BLOCK_UNITS)
    at = (reservoir * num_rows + row) * N + unit
    source = reservoir * grad_r + sequence * grad_b + chunk * grad_c + unit
    total = tl.load(carry + at, exists, other=0) + tl.load(grad + source, exists, other=0).to(tl.float32)
    if HAS_NEXT:
        outside, slope = tl.load(next_grad + source, exists, other=0), tl.load(next_gain + source, exists, other=0)
    x = delta + reservoir * delta_r + sequence * delta_b + chunk * delta_c
    w = weight + reservoir * N * N
    result = _product(x, w, row < num_rows, unit, N, BLOCK_ROWS, BLOCK_UNITS, BLOCK_DEPTH, STAGES)
    result += (1.0 - leak_rate) * total
    if HAS_RESET:  # nothing crosses the edge, through the leak or through W
        starts = _starts(reset, sequence, chunk, reset_b, reset_c, row < num_rows)
        result = tl.where(starts, 0.0, result)
    tl.store(next_carry + at, result, exists)
    if HAS_NEXT:
        slot = reservoir * next_r + sequence * next_b + chunk * next_c + unit
        of_input = leak_rate * (result + outside.to(tl.float32)) * slope.to(tl.float32)
        tl.store(next_delta + slot, of_input, exists)


def forward_step(
    carry: Tensor,
    state: Tensor,
    weight_transposed: Tensor,
    drive: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    next_state: Tensor,
    gain: Tensor | None,
) -> Tensor:
    """The next carry; writes that in drive's dtype to `next_state`, and the gain, alike in strides, where given.

    All are `[R, B, C, N]`, reset `[1, B, C, 1]`.  carry: fp32, dense; `state` is it in drive's dtype, and what is
    multiplied.  weight_transposed: `[R, N, N]` in drive's dtype, dense: neighbouring units read neighbouring numbers.
    """
    next_carry = torch.empty_like(carry)
    edge, edge_strides = _edges(reset, carry)
    grid, rows, options = _launch(carry, state)
    _reservoir_fwd_kernel[grid](
        *(
            carry,
            state,
            weight_transposed,
            drive,
            edge,
            next_carry,
            next_state,
            next_state if gain is None else gain,
            leak_rate,
        ),
        *(*rows, *state.stride()[:3], *drive.stride()[:3], *edge_strides, *next_state.stride()[:3]),
        *(carry.shape[-1], reset is not None, gain is not None),
        **options,
    )
    return next_carry


def backward_step(
    carry: Tensor,
    delta: Tensor,
    weight: Tensor,
    grad: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    following: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """The next carry, mu of the position before: (1 - a) (carry + grad) + W^T delta, zero where a document starts.

    following: grad and gain of the position before, both with the strides of `grad`, and where to write its delta.
    Shapes as in `forward_step`, the weight's too, which is not transposed here.
    """
    next_carry = torch.empty_like(carry)
    edge, edge_strides = _edges(reset, carry)
    next_grad, next_gain, next_delta = (grad, grad, delta) if following is None else following
    grid, rows, options = _launch(carry, delta)
    _reservoir_bwd_kernel[grid](
        *(carry, delta, weight, grad, edge, next_carry, next_grad, next_gain, next_delta, leak_rate),
        *(*rows, *delta.stride()[:3], *grad.stride()[:3], *edge_strides, *next_delta.stride()[:3]),
        *(carry.shape[-1], reset is not None, following is not None),
        **options,
    )
    return next_carry


def _edges(reset: Tensor | None, unused: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return (unused, (0, 0)) if reset is None else (reset.view(torch.uint8), reset.stride()[1:3])


def _launch(carry: Tensor, multiplied: Tensor) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, int]]:
    """Grid, numbers of rows and chunks, and constants of a kernel."""
    num_reservoirs, batch, num_chunks, num_units = carry.shape
    num_rows = batch * num_chunks
    rows, units, depth, stages, num_warps = TILES[row_count(num_rows)]
    grid = (triton.cdiv(num_units, units), triton.cdiv(num_rows, rows), num_reservoirs)
    depth = depth * 2 // multiplied.element_size()
    blocks = {"BLOCK_ROWS": rows, "BLOCK_UNITS": units, "BLOCK_DEPTH": depth, "STAGES": stages}
    return grid, (num_rows, num_chunks), blocks | {"num_warps": num_warps}
