"""The diagonal gated scan as a loop over time: the definition that every other path is tested against."""

import torch
from torch import Tensor


def diagonal_scan_reference(
    delta: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each channel on its own, with alpha_t = exp(-delta_t):

        c_t = 0 where reset_t, else h_{t-1}
        h_t = alpha_t c_t + (1 - alpha_t) v_t

    delta >= 0 and v `[B, T, D]`, state `[B, D]` (h_{-1}; None is zero), reset bool `[B, T]` or None.
    Returns h `[B, T, D]` in v's dtype and the final state `[B, D]`.  Everything is computed in float64 if an input
    is, else in float32; gradients are autograd's, which is exact for delta up to about 3: it forms exp(-delta) as
    1 + expm1(-delta).
    """
    compute_dtype = torch.promote_types(torch.promote_types(delta.dtype, v.dtype), torch.float32)
    delta, values = delta.to(compute_dtype), v.to(compute_dtype)
    # 1 - exp(-delta) has no correct digit for small delta.
    alpha, gain = torch.exp(-delta), -torch.expm1(-delta)
    carry = torch.zeros_like(values[:, 0]) if state is None else state.to(compute_dtype)
    states = []
    for t in range(v.shape[1]):
        if reset is not None:
            carry = carry.masked_fill(reset[:, t, None], 0)
        carry = alpha[:, t] * carry + gain[:, t] * values[:, t]
        states.append(carry)
    return torch.stack(states, dim=1).to(v.dtype), carry
