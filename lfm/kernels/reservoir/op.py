"""`reservoir_recurrence`: checks, the plan of chunks, and the closed-form gradient."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.reservoir.chunked import weight_gradient
from lfm.kernels.reservoir.grid import ChunkPlan
from lfm.kernels.reservoir.path import Path, choose, fill_chunk_length


@dataclass
class RecurrenceStats:
    """What one call saw; pass a fresh one per call.  All of it stays on the device, so nothing waits unless read."""

    forward_residual: Tensor = field(default_factory=lambda: torch.zeros(()))
    """fp32 `[R]`: boundary residual of the first pass, before any repair.  0 where nothing was cut."""
    saturation: Tensor = field(default_factory=lambda: torch.zeros(()))
    """fp32 `[]`: share of units and positions with |tanh| > 0.95."""
    mean_gain: Tensor = field(default_factory=lambda: torch.zeros(()))
    """fp32 `[]`: mean of 1 - tanh^2."""
    repair_passes: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int32))
    """int32 `[]`."""
    fell_back: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))
    """bool `[]`: the repairs did not suffice and the exact sequential path ran."""

    backward_residual: Tensor | None = None
    """As `forward_residual`, of the gradients handed from chunk to chunk; None until the backward has run."""
    backward_repair_passes: Tensor | None = None
    backward_fell_back: Tensor | None = None


def reservoir_recurrence(
    drive: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    leak_rate: float,
    backend: Literal["auto", "sequential", "chunked"] = "auto",
    chunk_length: int | Literal["fill"] = 128,
    warmup: int = 64,
    tolerance: float = 1e-2,
    max_repair_passes: int = 3,
    stats: RecurrenceStats | None = None,
) -> tuple[Tensor, Tensor]:
    """R leaky tanh reservoirs of N units over T positions; the equation is in `reference.py`.

    drive: `[B, T, R, N]`, the input already projected; its dtype is the one in which states and W are multiplied.
    weight: `[R, N, N]`, dense storage; z[n] = sum over m of W[n, m] x[m].
    state: `[B, R, N]`, the state before position 0; None is zero.
    reset: bool `[B, T]` or None; True where a document starts: nothing is carried into that position.

    Returns states `[B, T, R, N]` in drive's dtype and the final state `[B, R, N]`, fp32 (float64 if drive is).
    Carried states are fp32 whatever drive is, products accumulate in fp32.  Both results carry gradients to drive,
    weight and state.

    "sequential" is exact; "chunked" cuts time into chunks of `chunk_length` with `warmup` extra steps each, and is
    as exact as `tolerance` says; "auto" cuts only where that saves steps.  `chunk_length` must not follow the batch
    size, or results would, as they do with "fill": chunks of which one wave of the device's clusters holds all, 128
    elsewhere.  Either way, bf16 reservoirs of 256 or 512 units and fp32 ones of 128, 256 or 512 take one launch per
    sweep on a Hopper GPU; nothing waits for the device there, but for the residual of fp32 chunks.
    """
    _check(drive, weight, state, reset, leak_rate, chunk_length, warmup, max_repair_passes)
    num_positions = drive.shape[1]
    if chunk_length == "fill":
        chunk_length = fill_chunk_length(drive, warmup)
    plan = ChunkPlan(chunk_length, warmup, tolerance, max_repair_passes)
    if backend == "sequential" or (backend == "auto" and num_positions <= chunk_length + warmup):
        plan = plan.sequential(num_positions)
    elif backend not in ("auto", "chunked"):
        raise ValueError(f"backend={backend!r} is not one of 'auto', 'sequential', 'chunked'")

    inputs = (drive, weight, state)
    with_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    path = choose(drive, plan, with_backward=with_backward)
    if with_backward:
        return _ReservoirRecurrence.apply(drive, weight, state, reset, leak_rate, plan, path, stats)
    states, _, final = _forward(drive, weight, state, reset, leak_rate, plan, path, stats, with_gain=False)
    return states, final


class _ReservoirRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        drive: Tensor,
        weight: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        leak_rate: float,
        plan: ChunkPlan,
        path: Path,
        stats: RecurrenceStats | None,
    ) -> tuple[Tensor, Tensor]:
        rounded = weight.to(drive.dtype)  # once for both directions
        states, gain, final = _forward(drive, rounded, state, reset, leak_rate, plan, path, stats, with_gain=True)
        ctx.save_for_backward(rounded, state, reset, states, gain)
        ctx.leak_rate, ctx.plan, ctx.path, ctx.stats, ctx.weight_dtype = leak_rate, plan, path, stats, weight.dtype
        ctx.set_materialize_grads(False)
        return states, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_states, grad_final = grad_outputs
        weight, state, reset, states, gain = ctx.saved_tensors
        grad_states = torch.zeros_like(states) if grad_states is None else grad_states
        delta, outcome = ctx.path.backward(grad_states, grad_final, gain, weight, reset, ctx.leak_rate, ctx.plan)
        if ctx.stats is not None:
            ctx.stats.backward_residual = outcome.residual
            ctx.stats.backward_repair_passes = _on_device(outcome.repair_passes, gain.device)
            ctx.stats.backward_fell_back = _on_device(outcome.fell_back, gain.device)

        grad_weight = grad_state = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(delta, states, state, reset).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_state = outcome.final.transpose(0, 1).to(state.dtype)
        return delta, grad_weight, grad_state, None, None, None, None, None


def _forward(
    drive: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    path: Path,
    stats: RecurrenceStats | None,
    *,
    with_gain: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the sweep and fill `stats`; states, gain and the final state `[B, R, N]`."""
    given = (drive, weight, state, reset, leak_rate, plan)
    states, gain, statistics, outcome = path.forward(*given, with_gain=with_gain, with_statistics=stats is not None)
    if stats is not None:
        assert statistics is not None
        stats.forward_residual = outcome.residual
        stats.saturation, stats.mean_gain = statistics.unbind()
        stats.repair_passes = _on_device(outcome.repair_passes, drive.device)
        stats.fell_back = _on_device(outcome.fell_back, drive.device)
    return states, gain, outcome.final.transpose(0, 1).contiguous()


def _on_device(value: int | bool | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.bool if isinstance(value, bool) else torch.int32, device=device)


def _check(
    drive: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    chunk_length: int | Literal["fill"],
    warmup: int,
    max_repair_passes: int,
) -> None:
    if drive.dim() != 4 or drive.numel() == 0:
        raise ValueError(f"drive has shape {tuple(drive.shape)}; it needs [B, T, R, N] with no empty dimension")
    if not drive.is_floating_point():
        raise ValueError(f"drive is {drive.dtype}; it must be a floating dtype")
    batch, num_positions, num_reservoirs, num_units = drive.shape
    expected = {
        "weight": (weight, (num_reservoirs, num_units, num_units)),
        "state": (state, (batch, num_reservoirs, num_units)),
        "reset": (reset, (batch, num_positions)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but drive [B, T, R, N] of {tuple(drive.shape)} needs {shape}"
            )
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}; it must be bool")
    if state is not None and torch.promote_types(state.dtype, torch.float32) != state.dtype:
        raise ValueError(f"state is {state.dtype}; carried states are at least float32")
    if not 0 < leak_rate <= 1:
        raise ValueError(f"leak_rate={leak_rate} must lie in (0, 1]")
    if isinstance(chunk_length, str) and chunk_length != "fill":
        raise ValueError(f"chunk_length={chunk_length!r} must be a number of steps or 'fill'")
    if (chunk_length != "fill" and chunk_length < 1) or warmup < 0 or max_repair_passes < 0:
        raise ValueError(
            f"chunk_length={chunk_length} must be positive, warmup={warmup} and "
            f"max_repair_passes={max_repair_passes} not negative"
        )
