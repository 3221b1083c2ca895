"""A small problem on which a kernel's sweeps must agree with the definition before they are trusted."""

from collections.abc import Callable

import torch
from torch import Tensor

from lfm.kernels.nvcc import Unavailable
from lfm.kernels.reservoir.grid import ChunkPlan, Outcome
from lfm.kernels.reservoir.reference import reservoir_recurrence_reference

ForwardSweep = Callable[..., tuple[Tensor, Tensor, Outcome]]
BackwardSweep = Callable[..., tuple[Tensor, Outcome]]


def require_agreement(
    forward_sweep: ForwardSweep,
    backward_sweep: BackwardSweep,
    num_units: int,
    device: torch.device,
    dtype: torch.dtype,
    bound: float,
) -> None:
    """Raise Unavailable unless both sweeps, called as those of `chunked.py`, are within `bound` of the reference in
    float64, by norm: with a warm-up, a reset, padding and repairs."""
    generator = torch.Generator().manual_seed(0)
    batch, num_positions, num_reservoirs, _ = shape = (2, 21, 2, num_units)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.inference_mode(False), torch.enable_grad():
        drive, grad_states = normal(*shape).to(dtype), normal(*shape).to(dtype)
        weight = (normal(num_reservoirs, num_units, num_units) / num_units**0.5).to(dtype)
        initial, grad_final = normal(batch, num_reservoirs, num_units).tanh(), normal(batch, num_reservoirs, num_units)
        reset = torch.zeros(batch, num_positions, dtype=torch.bool)
        reset[1, 11] = True
        leaves = [drive.double().requires_grad_(), initial.double().requires_grad_()]
        want = reservoir_recurrence_reference(leaves[0], weight.double(), leaves[1], reset, leak_rate=0.3)
        grads = torch.autograd.grad(want, leaves, [grad_states.double(), grad_final.double()])

    with torch.no_grad():
        plan = ChunkPlan(chunk_length=8, warmup=8, tolerance=0.0, max_repair_passes=2)
        drive, weight, initial, reset = (x.to(device) for x in (drive, weight, initial, reset))
        states, gain, forward = forward_sweep(drive, weight, initial, reset, 0.3, plan, with_gain=True)
        grad_states, grad_final = grad_states.to(device), grad_final.to(device)
        delta, backward = backward_sweep(grad_states, grad_final, gain, weight, reset, 0.3, plan)
        found = (states, forward.final.transpose(0, 1), delta, backward.final.transpose(0, 1))
        for name, got, right in zip(("states", "final", "delta", "mu"), found, (*want, *grads), strict=True):
            error = float((got.cpu().double() - right.detach()).norm() / right.detach().norm())
            if not error < bound:
                raise Unavailable(f"its {name} of {num_units} units are off by {error:.1e} of their norm")
        if forward.fell_back or backward.fell_back:
            raise Unavailable(f"its chunks of {num_units} units did not agree after repairing all of them")
