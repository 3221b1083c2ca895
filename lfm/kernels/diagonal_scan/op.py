"""`diagonal_scan`: checks, the parallel path and the closed-form gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.diagonal_scan.chunked import linear_recurrence


def diagonal_scan(delta: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h_t = alpha_t h_{t-1} + (1 - alpha_t) v_t` a channel, alpha = exp(-delta); the equation is in `reference.py`.

    delta: `[B, T, D]`, not negative; ln 2 / delta is the half-life in tokens.
    v: `[B, T, D]`.
    state: `[B, D]`, the state before position 0; None is zero.
    reset: bool `[B, T]` or None; True where a document starts: nothing is carried into that position.

    Returns h `[B, T, D]` in v's dtype and the final state `[B, D]`, fp32 (float64 if an input is).  Any of delta and v
    may be bf16: decays, products and carried states are fp32 all the same.  Both results carry gradients to delta, v
    and state.
    """
    _check(delta, v, state, reset)
    inputs = (delta, v, state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _DiagonalScan.apply(delta, v, state, reset)
    return _forward(delta, v, state, reset)


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, final = _forward(delta, v, state, reset)
        ctx.save_for_backward(delta, v, state, reset, h)
        return h, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_final = grad_outputs
        delta, v, state, reset, h = ctx.saved_tensors
        alpha, gain = _decay(delta, v)
        carried = alpha if reset is None else alpha.masked_fill(reset[..., None], 0)

        # The adjoint is the same recurrence, down in time, with the decay of the position after.
        grad = grad_h.to(alpha.dtype, copy=True)
        grad[:, -1] += grad_final
        zero = torch.zeros_like(grad[:, 0])
        decay = torch.cat((carried[:, 1:], zero[:, None]), dim=1)
        grad = linear_recurrence(decay.flip(1), grad.flip(1), zero).flip(1)

        before = torch.cat(((zero if state is None else state.to(zero.dtype))[:, None], h[:, :-1].to(zero.dtype)), 1)
        if reset is not None:
            before = before.masked_fill(reset[..., None], 0)
        grad_delta = (grad * alpha * (v - before)).to(delta.dtype)
        grad_state = (carried[:, 0] * grad[:, 0]).to(state.dtype) if state is not None else None
        return grad_delta, (gain * grad).to(v.dtype), grad_state, None


def _forward(delta: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    alpha, gain = _decay(delta, v)
    carried = alpha if reset is None else alpha.masked_fill(reset[..., None], 0)
    start = torch.zeros_like(alpha[:, 0]) if state is None else state.to(alpha.dtype)
    h = linear_recurrence(carried, gain * v, start)
    return h.to(v.dtype), h[:, -1].clone()


def _decay(delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and 1 - alpha, which expm1 gives to all digits where alpha is near 1."""
    delta = delta.to(torch.promote_types(torch.promote_types(delta.dtype, v.dtype), torch.float32))
    return torch.exp(-delta), -torch.expm1(-delta)


def _check(delta: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None) -> None:
    if v.dim() != 3 or v.numel() == 0:
        raise ValueError(f"v has shape {tuple(v.shape)}; it needs [B, T, D] with no empty dimension")
    batch, num_positions, num_channels = v.shape
    expected = {
        "delta": (delta, (batch, num_positions, num_channels)),
        "state": (state, (batch, num_channels)),
        "reset": (reset, (batch, num_positions)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but v [B, T, D] of {tuple(v.shape)} needs {shape}"
            )
    for name, tensor in (("delta", delta), ("v", v)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating dtype")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}; it must be bool")
    if state is not None and torch.promote_types(state.dtype, torch.float32) != state.dtype:
        raise ValueError(f"state is {state.dtype}; carried states are at least float32")
