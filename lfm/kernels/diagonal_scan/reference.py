"""The diagonal gated scan as a loop over time: the definition that every other path is tested against."""

import math

import torch
from torch import Tensor


def diagonal_scan_reference(
    gate: Tensor, bias: Tensor, value: Tensor, state: Tensor | None, reset: Tensor | None, *, delta_min: float
) -> tuple[Tensor, Tensor]:
    """Each channel on its own:

        alpha_t = exp(-delta_t),   delta_t = softplus(gate_t + bias) + delta_min
        c_t     = 0 where reset_t, else h_{t-1}
        h_t     = alpha_t c_t + (1 - alpha_t) tanh(value_t)

    gate and value `[B, T, D]`, bias `[D]`, state `[B, D]` (h_{-1}; None is zero), reset bool `[B, T]` or None.
    Returns h `[B, T, D]` in value's dtype and the final state `[B, D]`.  Everything is computed in float64 if an input
    is, else in float32; gradients are autograd's.
    """
    compute_dtype = torch.promote_types(torch.promote_types(gate.dtype, value.dtype), torch.float32)
    x, v = gate.to(compute_dtype) + bias.to(compute_dtype), value.to(compute_dtype).tanh()
    # exp(-softplus(x)) is sigmoid(-x).  Whichever of alpha and 1 - alpha is small is computed, the other one is its
    # complement: so both, and their derivatives by autograd, have all their digits.
    small = math.exp(-delta_min) * torch.sigmoid(torch.where(x > 0, -x, x))
    gain = torch.where(x > 0, 1 - small, -math.expm1(-delta_min) + small)
    alpha = torch.where(x > 0, small, 1 - gain)
    carry = torch.zeros_like(v[:, 0]) if state is None else state.to(compute_dtype)
    states = []
    for t in range(v.shape[1]):
        if reset is not None:
            carry = carry.masked_fill(reset[:, t, None], 0)
        carry = alpha[:, t] * carry + gain[:, t] * v[:, t]
        states.append(carry)
    return torch.stack(states, dim=1).to(value.dtype), carry
