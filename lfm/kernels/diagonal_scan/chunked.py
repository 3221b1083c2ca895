"""The diagonal gated scan in plain PyTorch, for any device and for float64: about 2 sqrt(T) dependent steps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    gate: Tensor, bias: Tensor, value: Tensor, state: Tensor | None, reset: Tensor | None, delta_min: float
) -> tuple[Tensor, Tensor]:
    """h `[B, T, D]` in value's dtype and the final state `[B, D]`; arguments as of `diagonal_scan`."""
    gain, alpha, _, v = _gates(gate, bias, value, delta_min)
    carried = alpha if reset is None else alpha.masked_fill(reset[..., None], 0)
    start = torch.zeros_like(v[:, 0]) if state is None else state.to(v.dtype)
    h = linear_recurrence(carried, gain * v, start)
    return h.to(value.dtype), h[:, -1].clone()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, bias, value and of the state, those of bias `[D]` and state `[B, D]` at least fp32."""
    gain, alpha, slope, v = _gates(gate, bias, value, delta_min)
    carried = alpha if reset is None else alpha.masked_fill(reset[..., None], 0)

    # The adjoint is the same recurrence, down in time, with the decay of the position after.
    grad = grad_h.to(v.dtype, copy=True)
    grad[:, -1] += grad_final
    zero = torch.zeros_like(grad[:, 0])
    decay = torch.cat((carried[:, 1:], zero[:, None]), dim=1)
    grad = linear_recurrence(decay.flip(1), grad.flip(1), zero).flip(1)

    before = torch.cat(((zero if state is None else state.to(v.dtype))[:, None], h[:, :-1].to(v.dtype)), 1)
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    grad_gate = grad * slope * (v - before)
    grad_value = gain * grad * (1 - v.square())
    # The gradient of bias is summed before rounding.
    return (
        grad_gate.to(gate.dtype),
        grad_gate.sum((0, 1)),
        grad_value.to(value.dtype),
        carried[:, 0] * grad[:, 0],
    )


def linear_recurrence(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    """Every `x_t = decay_t x_{t-1} + drive_t` of `[B, T, D]`, with x_{-1} = start `[B, D]`; all of one dtype.

    Time is cut into ceil(sqrt(T)) chunks of as many positions, which depends on T alone.  All chunks walk through
    their positions together, from zero, and keep the product of their decays beside the sum; then the carry walks from
    chunk to chunk and is added everywhere.  Products of decays may underflow, to the zero that they then are: nothing
    is ever divided by them.
    """
    num_positions = drive.shape[1]
    length = math.isqrt(num_positions - 1) + 1
    num_chunks = -(-num_positions // length)
    padding = (0, 0, 0, num_chunks * length - num_positions)
    # [B, C, L, D], copies that are overwritten: from position 0 of the chunk on, the product and the sum.
    product, x = (F.pad(t, padding).unflatten(1, (num_chunks, length)).clone() for t in (decay, drive))
    for i in range(1, length):
        x[:, :, i].addcmul_(product[:, :, i], x[:, :, i - 1])
        product[:, :, i].mul_(product[:, :, i - 1])
    carries = [start]
    for chunk in range(num_chunks - 1):
        carries.append(torch.addcmul(x[:, chunk, -1], product[:, chunk, -1], carries[-1]))
    x.addcmul_(product, torch.stack(carries, dim=1)[:, :, None])
    return x.flatten(1, 2)[:, :num_positions]


def _gates(gate: Tensor, bias: Tensor, value: Tensor, delta_min: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 - alpha, alpha, -d alpha / d gate and tanh(value), in at least fp32.

    1 - alpha is a sum of positive terms, so that it has all its digits where alpha is near 1.
    """
    dtype = torch.promote_types(torch.promote_types(gate.dtype, value.dtype), torch.float32)
    x, v = gate.to(dtype) + bias.to(dtype), value.to(dtype).tanh()
    largest = math.exp(-delta_min)
    rise, alpha = torch.sigmoid(x), largest * torch.sigmoid(-x)
    return -math.expm1(-delta_min) + largest * rise, alpha, alpha * rise, v
