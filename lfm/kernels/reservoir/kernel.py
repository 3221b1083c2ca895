"""Triton kernels of what a step of the chunked recurrence does besides its matrix product, forward and backward.

A program takes BLOCK units of one chunk of one sequence.  Chunks lie in strided views of `[B, T, R, N]` tensors, whose
strides over reservoirs, sequences and chunks are given; carried states are `[R, B, C, N]`, dense.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 512, 4


@triton.jit
def _rows(num_sequences, num_chunks, stride_r, stride_b, stride_c, reset, reset_b, reset_c, HAS_RESET: tl.constexpr):
    """Of this program's row: its number, its offset in a strided view, whether a document starts at it."""
    row = tl.program_id(0).to(tl.int64)
    reservoir, sequence = row // (num_sequences * num_chunks), row // num_chunks % num_sequences
    chunk = row % num_chunks
    starts = False
    if HAS_RESET:
        starts = tl.load(reset + sequence * reset_b + chunk * reset_c) != 0
    return row, reservoir * stride_r + sequence * stride_b + chunk * stride_c, starts


@triton.jit
def _tanh(z):
    """To fp32's precision near zero as well, where the quotient has lost its digits."""
    falling = tl.exp(-2.0 * tl.abs(z))
    quotient = (1.0 - falling) / (1.0 + falling)
    square = z * z
    series = z * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.2, series, tl.where(z < 0, -quotient, quotient))


@triton.jit
def _reservoir_fwd_kernel(
    product,
    carry,
    drive,
    reset,
    next_carry,
    exchanged,
    states,
    gain,
    leak_rate,
    num_sequences,
    num_chunks,
    drive_r,
    drive_b,
    drive_c,
    reset_b,
    reset_c,
    states_r,
    states_b,
    states_c,
    N: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RECORDS: tl.constexpr,
    WITH_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, source, starts = _rows(
        num_sequences, num_chunks, drive_r, drive_b, drive_c, reset, reset_b, reset_c, HAS_RESET
    )
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = unit < N
    at = row * N + unit
    received, multiplied = tl.load(carry + at, exists, other=0), tl.load(product + at, exists, other=0)
    if HAS_RESET:
        received, multiplied = tl.where(starts, 0.0, received), tl.where(starts, 0.0, multiplied)
    squashed = _tanh(multiplied + tl.load(drive + source + unit, exists, other=0).to(tl.float32))
    state = received + leak_rate * (squashed - received)
    tl.store(next_carry + at, state, exists)
    tl.store(exchanged + at, state, exists)
    if RECORDS:
        _, slot, _ = _rows(num_sequences, num_chunks, states_r, states_b, states_c, reset, 0, 0, False)
        tl.store(states + slot + unit, state, exists)
        if WITH_GAIN:
            tl.store(gain + slot + unit, 1.0 - squashed * squashed, exists)


@triton.jit
def _reservoir_bwd_kernel(
    carry,
    grad,
    gain,
    reset,
    kept,
    exchanged,
    delta,
    leak_rate,
    num_sequences,
    num_chunks,
    grad_r,
    grad_b,
    grad_c,
    reset_b,
    reset_c,
    delta_r,
    delta_b,
    delta_c,
    N: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RECORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, source, starts = _rows(num_sequences, num_chunks, grad_r, grad_b, grad_c, reset, reset_b, reset_c, HAS_RESET)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = unit < N
    at = row * N + unit
    total = tl.load(carry + at, exists, other=0) + tl.load(grad + source + unit, exists, other=0).to(tl.float32)
    of_input = leak_rate * total * tl.load(gain + source + unit, exists, other=0).to(tl.float32)
    passed, passed_on = (1.0 - leak_rate) * total, of_input
    if HAS_RESET:  # nothing crosses the edge, through the leak or through W
        passed, passed_on = tl.where(starts, 0.0, passed), tl.where(starts, 0.0, passed_on)
    tl.store(kept + at, passed, exists)
    tl.store(exchanged + at, passed_on, exists)
    if RECORDS:
        _, slot, _ = _rows(num_sequences, num_chunks, delta_r, delta_b, delta_c, reset, 0, 0, False)
        tl.store(delta + slot + unit, of_input, exists)


def forward_step(
    product: Tensor,
    carry: Tensor,
    drive: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    states: Tensor | None,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The next carry, and that in drive's dtype.  All `[R, B, C, N]`, reset `[1, B, C, 1]`; product and carry fp32 and
    dense; writes states and gain, alike in strides, where given."""
    _, batch, num_chunks, num_units = carry.shape
    next_carry, exchanged = torch.empty_like(carry), torch.empty_like(carry, dtype=drive.dtype)
    slots = drive if states is None else states
    edge, edge_strides = _edges(reset, carry)
    _reservoir_fwd_kernel[_grid(carry)](
        *(product, carry, drive, edge, next_carry, exchanged, slots, slots if gain is None else gain, leak_rate),
        *(batch, num_chunks, *drive.stride()[:3], *edge_strides, *slots.stride()[:3], num_units),
        *(reset is not None, states is not None, gain is not None, BLOCK),
        num_warps=NUM_WARPS,
    )
    return next_carry, exchanged


def backward_step(
    carry: Tensor, grad: Tensor, gain: Tensor, reset: Tensor | None, leak_rate: float, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What of the gradient passes through the leak, fp32, and what W^T multiplies, in gain's dtype; both zero where a
    document starts.  Shapes as in `forward_step`; grad and gain alike in strides; writes delta where given."""
    _, batch, num_chunks, num_units = carry.shape
    kept, exchanged = torch.empty_like(carry), torch.empty_like(carry, dtype=gain.dtype)
    slots = gain if delta is None else delta
    edge, edge_strides = _edges(reset, carry)
    _reservoir_bwd_kernel[_grid(carry)](
        *(carry, grad, gain, edge, kept, exchanged, slots, leak_rate),
        *(batch, num_chunks, *grad.stride()[:3], *edge_strides, *slots.stride()[:3], num_units),
        *(reset is not None, delta is not None, BLOCK),
        num_warps=NUM_WARPS,
    )
    return kept, exchanged


def _edges(reset: Tensor | None, unused: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return (unused, (0, 0)) if reset is None else (reset.view(torch.uint8), reset.stride()[1:3])


def _grid(carry: Tensor) -> tuple[int, int]:
    return carry.shape[:-1].numel(), triton.cdiv(carry.shape[-1], BLOCK)
