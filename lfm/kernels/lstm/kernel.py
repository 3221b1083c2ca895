"""Triton kernels of one step of an LSTM layer, forward and adjoint.

A program owns UNITS hidden units of ROWS sequences. It multiplies what the step before left, of all units, by its rows
of the weight, and does the rest of the step in registers; launches are the barriers between steps.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNITS, NUM_WARPS, NUM_STAGES = 16, 4, 4
MOST_ROWS = 64
BLOCK_K = 128
"""Of the forward product over H; the adjoint's over 4 H takes twice as many."""


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _lstm_step_fwd_kernel(
    z, h_before, h, c_before, c, weight, bias, reset, B, rows_of_z, rows_of_h, rows_of_reset, H,
    FIRST: tl.constexpr, RESETS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = (row < B)[:, None] & (unit < H)[None, :]
    at = row[:, None] * rows_of_z + unit[None, :]
    here = row[:, None] * rows_of_h + unit[None, :]
    before = tl.zeros([ROWS, UNITS], tl.float32)
    i, f, g, o = before, before, before, before
    if not FIRST:
        goes_on = (row < B)[:, None]
        if RESETS:
            goes_on = tl.load(reset + row * rows_of_reset, row < B, other=1)[:, None] == 0
        before = tl.load(c_before + here, exists & goes_on, other=0)
        for start in range(0, H, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                h_before + row[:, None] * rows_of_h + k[None, :], (row < B)[:, None] & (k < H)[None, :], other=0
            )
            w = weight + unit[None, :] * H + k[:, None]  # [BLOCK_K, UNITS]
            inside = (k < H)[:, None] & (unit < H)[None, :]
            i = tl.dot(x, tl.load(w, inside, other=0), i)
            f = tl.dot(x, tl.load(w + H * H, inside, other=0), f)
            g = tl.dot(x, tl.load(w + 2 * H * H, inside, other=0), g)
            o = tl.dot(x, tl.load(w + 3 * H * H, inside, other=0), o)
        if RESETS:
            i, f = tl.where(goes_on, i, 0), tl.where(goes_on, f, 0)
            g, o = tl.where(goes_on, g, 0), tl.where(goes_on, o, 0)
    i += tl.load(z + at, exists, other=0) + tl.load(bias + unit, unit < H, other=0)[None, :]
    f += tl.load(z + at + H, exists, other=0) + tl.load(bias + H + unit, unit < H, other=0)[None, :]
    g += tl.load(z + at + 2 * H, exists, other=0) + tl.load(bias + 2 * H + unit, unit < H, other=0)[None, :]
    o += tl.load(z + at + 3 * H, exists, other=0) + tl.load(bias + 3 * H + unit, unit < H, other=0)[None, :]
    tl.store(z + at, i, exists)
    tl.store(z + at + H, f, exists)
    tl.store(z + at + 2 * H, g, exists)
    tl.store(z + at + 3 * H, o, exists)
    after = tl.sigmoid(f) * before + tl.sigmoid(i) * _tanh(g)
    tl.store(c + here, after, exists)
    tl.store(h + here, tl.sigmoid(o) * _tanh(after), exists)


@triton.jit
def _lstm_step_bwd_kernel(
    grad_h, z, c_before, c, grad_z_after, grad_z, grad_c, weight, reset, reset_after,
    B, rows_of_z, rows_of_h, rows_of_grad, rows_of_reset, H,
    FIRST: tl.constexpr, LAST: tl.constexpr, RESETS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = (row < B)[:, None] & (unit < H)[None, :]
    own = row[:, None] * H + unit[None, :]
    dh, dc = tl.zeros([ROWS, UNITS], tl.float32), tl.zeros([ROWS, UNITS], tl.float32)
    if not LAST:
        goes_on = (row < B)[:, None]
        if RESETS:
            goes_on = tl.load(reset_after + row * rows_of_reset, row < B, other=1)[:, None] == 0
        dc = tl.load(grad_c + own, exists & goes_on, other=0)
        for start in range(0, 4 * H, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            given = (row < B)[:, None] & (k < 4 * H)[None, :]
            x = tl.load(grad_z_after + row[:, None] * rows_of_z + k[None, :], given, other=0)
            w = weight + unit[None, :] * (4 * H) + k[:, None]  # [BLOCK_K, UNITS]
            dh = tl.dot(x, tl.load(w, (k < 4 * H)[:, None] & (unit < H)[None, :], other=0), dh)
        if RESETS:
            dh = tl.where(goes_on, dh, 0)
    dh += tl.load(grad_h + row[:, None] * rows_of_grad + unit[None, :], exists, other=0).to(tl.float32)
    at = row[:, None] * rows_of_z + unit[None, :]
    here = row[:, None] * rows_of_h + unit[None, :]
    i, f = tl.sigmoid(tl.load(z + at, exists, other=0)), tl.sigmoid(tl.load(z + at + H, exists, other=0))
    g, o = _tanh(tl.load(z + at + 2 * H, exists, other=0)), tl.sigmoid(tl.load(z + at + 3 * H, exists, other=0))
    before = tl.zeros([ROWS, UNITS], tl.float32)
    if not FIRST:
        went_on = (row < B)[:, None]
        if RESETS:
            went_on = tl.load(reset + row * rows_of_reset, row < B, other=1)[:, None] == 0
        before = tl.load(c_before + here, exists & went_on, other=0)
    squashed = _tanh(tl.load(c + here, exists, other=0))
    dc += dh * o * (1 - squashed * squashed)
    tl.store(grad_z + at, dc * g * i * (1 - i), exists)
    tl.store(grad_z + at + H, dc * before * f * (1 - f), exists)
    tl.store(grad_z + at + 2 * H, dc * i * (1 - g * g), exists)
    tl.store(grad_z + at + 3 * H, dh * squashed * o * (1 - o), exists)
    tl.store(grad_c + own, dc * f, exists)


@dataclass
class Steps:
    """Tensors of S consecutive steps of a layer; in each a sequence has one row behind the other, `[B, S, ...]`."""

    z: Tensor
    """fp32 `[B, S, 4H]`: the product with the inputs, then the whole sum in front of the gates."""
    h: Tensor
    """`[B, S, H]` in the weights' dtype."""
    c: Tensor
    """fp32 `[B, S, H]`."""
    reset: Tensor | None
    """bool `[B, S]`."""
    grad_z: Tensor | None = None
    """`[B, S, 4H]` in the weights' dtype; of the adjoint."""


def forward_steps(steps: Steps, before: Steps | None, weight: Tensor, bias: Tensor) -> None:
    """Writes z, h and c, from z, which holds the product with the inputs, and those `before`; weight `[4H, H]`, bias
    fp32 `[4H]`."""
    (B, S, H), z = steps.h.shape, steps.z
    for t in range(S):
        source, last = (steps, t - 1) if t > 0 or before is None else (before, S - 1)
        last = max(last, 0)
        _lstm_step_fwd_kernel[_grid(B, H)](
            z[:, t], source.h[:, last], steps.h[:, t], source.c[:, last], steps.c[:, t], weight, bias,
            _at(steps, t), B, z.stride(0), steps.h.stride(0), S, H,
            FIRST=t == 0 and before is None, RESETS=steps.reset is not None, ROWS=_rows(B), UNITS=UNITS,
            BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


def backward_steps(
    steps: Steps, before: Steps | None, after: Steps | None, grad_h: Tensor, grad_c: Tensor, turned: Tensor
) -> None:
    """Writes grad_z, from what `forward_steps` left, the gradient of h `[B, S, H]`, grad_z of those `after`, and
    grad_c, fp32 `[B, H]`, which holds the gradient of c behind the steps and then that in front of them; turned
    `[H, 4H]`: the weight's transpose.  All but grad_h are contiguous."""
    (B, S, H), z = steps.h.shape, steps.z
    assert steps.grad_z is not None
    for t in reversed(range(S)):
        source, last = (steps, t - 1) if t > 0 or before is None else (before, S - 1)
        following, next_ = (steps, t + 1) if t < S - 1 or after is None else (after, 0)
        next_ = min(next_, S - 1)
        assert following.grad_z is not None
        _lstm_step_bwd_kernel[_grid(B, H)](
            grad_h[:, t], z[:, t], source.c[:, max(last, 0)], steps.c[:, t], following.grad_z[:, next_],
            steps.grad_z[:, t], grad_c, turned, _at(steps, t), _at(following, next_),
            B, z.stride(0), steps.c.stride(0), grad_h.stride(0), S, H,
            FIRST=t == 0 and before is None, LAST=t == S - 1 and after is None, RESETS=steps.reset is not None,
            ROWS=_rows(B), UNITS=UNITS, BLOCK_K=2 * BLOCK_K, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


def _at(steps: Steps, t: int) -> Tensor:
    return steps.z if steps.reset is None else steps.reset.view(torch.uint8)[:, t]


def _rows(batch: int) -> int:
    return min(MOST_ROWS, max(16, triton.next_power_of_2(batch)))


def _grid(batch: int, hidden_size: int) -> tuple[int, int]:
    return triton.cdiv(hidden_size, UNITS), triton.cdiv(batch, _rows(batch))


def inputs_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T`, `[B, S, I]` and `[4H, I]`, in fp32."""
    rows = x.flatten(0, 1)
    if x.is_cuda and x.dtype != torch.float32:
        product = torch.mm(rows, weight.T, out_dtype=torch.float32)
    else:
        product = rows.float() @ weight.float().T
    return product.view(*x.shape[:2], len(weight))
