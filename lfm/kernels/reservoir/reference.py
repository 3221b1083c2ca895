"""The reservoir recurrence as a loop over time: the definition that every other path is tested against."""

import torch
from torch import Tensor


def reservoir_recurrence_reference(
    drive: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None, *, leak_rate: float
) -> tuple[Tensor, Tensor]:
    """Leaky echo state network (Jaeger et al. 2007), with a = `leak_rate` and W = `weight` of each reservoir:

        c_t = 0 where reset_t, else h_{t-1}
        h_t = (1 - a) c_t + a tanh(W c_t + drive_t)

    drive `[B, T, R, N]`, weight `[R, N, N]`, state `[B, R, N]` (h_{-1}; None is zero), reset bool `[B, T]` or None.
    Returns states `[B, T, R, N]` in drive's dtype and the final state `[B, R, N]`.  Everything is computed in
    float64 if drive is, else in float32; gradients are autograd's.
    """
    compute_dtype = torch.promote_types(drive.dtype, torch.float32)
    batch, num_positions, num_reservoirs, num_units = drive.shape
    if state is None:
        carry = torch.zeros(batch, num_reservoirs, num_units, dtype=compute_dtype, device=drive.device)
    else:
        carry = state.to(compute_dtype)
    weight = weight.to(compute_dtype)
    states = []
    for t in range(num_positions):
        if reset is not None:
            carry = carry.masked_fill(reset[:, t, None, None], 0)
        squashed = torch.tanh(torch.einsum("rnm,brm->brn", weight, carry) + drive[:, t].to(compute_dtype))
        carry = (1 - leak_rate) * carry + leak_rate * squashed
        states.append(carry)
    return torch.stack(states, dim=1).to(drive.dtype), carry
