"""The reservoir recurrence and its adjoint as many chunks in parallel, in plain PyTorch.  No autograd, no checks.

A reservoir forgets its start, so a sequence can be cut into C chunks of L positions, each begun w positions early
from zero: by the time a chunk reaches its own first position, its state is right.  All B*C chunks are rows of one
small matrix product per step, and w + L dependent steps take the place of T.  Every call measures how right the
states were, repairs what was not, and takes the exact path (one chunk, no warm-up) if repairs do not help.

Inside, a carried state is `[R, B, C, N]`: the columns C are chunks in order of time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lfm.kernels.backend import Backend, draw, runs_triton, widest
from lfm.kernels.reservoir.graph import replayed
from lfm.kernels.reservoir.grid import SATURATED_BELOW, ChunkGrid, ChunkPlan, Outcome, row_count


def forward_sweep(
    drive: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    *,
    with_gain: bool,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Outcome]:
    """States and gain d = 1 - tanh^2, both `[B, T, R, N]` in drive's dtype (d is not derived from a stored tanh:
    near saturation 1 - s^2 of a bf16 s has no correct digit).  Shapes as in `reference.py`.

    With Triton a step is one kernel, else its matrix product and six more.
    """
    grid = ChunkGrid(drive.shape[1], plan, reverse=False)
    fused = runs_triton(drive, backend, _comparison, drive.shape[-1], row_count(len(drive) * grid.num_chunks))
    drive = drive.contiguous() if fused else drive
    drive_windows = grid.windows(drive)
    reset_windows = None if reset is None else grid.windows(reset[:, :, None, None])
    weight_transposed = exchange_weight(weight, drive, fused).transpose(1, 2)
    if fused:
        weight_transposed = weight_transposed.contiguous()
    states, state_slots = grid.new_output(drive)
    gain, gain_slots = grid.new_output(drive) if with_gain else (None, None)
    one = torch.ones((), dtype=compute_dtype(drive), device=drive.device)

    latest: list[tuple[Tensor, Tensor]] = []  # the carry last returned, and that in drive's dtype

    def advance_fused(carry: Tensor, step: int, record: bool) -> Tensor:
        from lfm.kernels.reservoir.kernel import forward_step

        known = bool(latest) and latest[0][0] is carry
        state = latest[0][1] if known else carry.to(drive.dtype)
        index, slot = grid.index(step), grid.slot(step)
        reset = None if reset_windows is None else reset_windows[index]
        next_state = state_slots[slot] if record else torch.empty_like(carry, dtype=drive.dtype)
        gain = gain_slots[slot] if record and gain_slots is not None else None
        windows = (drive_windows[index], reset)
        carry = forward_step(carry.contiguous(), state, weight_transposed, *windows, leak_rate, next_state, gain)
        latest[:] = [(carry, next_state)]
        return carry

    def advance(carry: Tensor, step: int, record: bool) -> Tensor:
        index = grid.index(step)
        if reset_windows is not None:
            carry = carry.masked_fill(reset_windows[index], 0)
        product = exchange_product(carry.to(drive.dtype), weight_transposed, carry.dtype)
        squashed = product.add_(drive_windows[index]).tanh_()
        carry = torch.lerp(carry, squashed, leak_rate)
        if record:
            state_slots[grid.slot(step)].copy_(carry)
            if gain_slots is not None:
                torch.addcmul(one, squashed, squashed, value=-1, out=gain_slots[grid.slot(step)])
        return carry

    step = advance_fused if fused else advance
    outcome = solve(grid, step, start_state(drive, initial), reset_windows, plan)
    if outcome.fell_back:
        exact_plan = plan.sequential(drive.shape[1])
        states, gain, exact = forward_sweep(
            drive, weight, initial, reset, leak_rate, exact_plan, with_gain=with_gain, backend=backend
        )
        outcome = replace(outcome, final=exact.final)
    return states.contiguous(), None if gain is None else gain.contiguous(), outcome


def backward_sweep(
    grad_states: Tensor,
    grad_final: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Outcome]:
    """The gradient of drive, delta `[B, T, R, N]` in gain's dtype; the outcome's `final` is the gradient of the
    initial state.  It runs down in time, is linear, and carries mu_t, the gradient of h_t from all later positions:

        lambda_t = grad_states_t + mu_t,   delta_t = a d_t lambda_t,   mu_{T-1} = grad_final, None is zero
        mu_{t-1} = 0 where reset_t, else (1 - a) lambda_t + W^T delta_t
    """
    grid = ChunkGrid(gain.shape[1], plan, reverse=True)
    fused = runs_triton(gain, backend, _comparison, gain.shape[-1], row_count(len(gain) * grid.num_chunks))
    if fused:
        grad_states, gain = grad_states.contiguous(), gain.contiguous()
    grad_windows, gain_windows = grid.windows(grad_states), grid.windows(gain)
    reset_windows = None if reset is None else grid.windows(reset[:, :, None, None])
    rounded_weight = exchange_weight(weight, gain, fused)
    delta_out, delta_slots = grid.new_output(gain)

    latest: list[tuple[Tensor, Tensor]] = []  # the carry last returned, and the delta that follows from it

    def room(carry: Tensor, step: int) -> Tensor:
        return torch.empty_like(carry, dtype=gain.dtype) if step < 0 else delta_slots[grid.slot(step)]

    def advance_fused(carry: Tensor, step: int, record: bool) -> Tensor:
        from lfm.kernels.reservoir.kernel import backward_step

        index = grid.index(step)
        if latest and latest[0][0] is carry:
            delta = latest[0][1]
        else:
            delta = room(carry, step)
            delta.copy_((carry + grad_windows[index]).mul_(gain_windows[index]).mul_(leak_rate))
        ahead, following = step + 1, None
        if ahead not in (0, grid.length):  # there, `solve` goes on from another carry
            index_ahead = grid.index(ahead)
            following = (grad_windows[index_ahead], gain_windows[index_ahead], room(carry, ahead))
        windows = (grad_windows[index], None if reset_windows is None else reset_windows[index])
        carry = backward_step(carry.contiguous(), delta, rounded_weight, *windows, leak_rate, following)
        latest[:] = [] if following is None else [(carry, following[2])]
        return carry

    def advance(carry: Tensor, step: int, record: bool) -> Tensor:
        index = grid.index(step)
        total = carry + grad_windows[index]
        delta = (total * gain_windows[index]).mul_(leak_rate)
        carry = exchange_product(delta.to(gain.dtype), rounded_weight, carry.dtype).add_(total, alpha=1 - leak_rate)
        if reset_windows is not None:
            carry.masked_fill_(reset_windows[index], 0)
        if record:
            delta_slots[grid.slot(step)].copy_(delta)
        return carry

    step = advance_fused if fused else advance
    outcome = solve(grid, step, start_state(gain, grad_final), reset_windows, plan)
    if outcome.fell_back:
        args = (grad_states, grad_final, gain, weight, reset, leak_rate, plan.sequential(gain.shape[1]))
        delta_out, exact = backward_sweep(*args, backend=backend)
        outcome = replace(outcome, final=exact.final)
    return delta_out.contiguous(), outcome


def graphed_forward_sweep(
    drive: Tensor, weight: Tensor, initial: Tensor | None, reset: Tensor | None, leak_rate: float, plan: ChunkPlan
) -> tuple[Tensor, Tensor | None, Outcome]:
    """`forward_sweep` with gain, its first pass replayed from a CUDA graph; launched anew only if that needs repair."""

    def run(drive: Tensor, weight: Tensor, initial: Tensor | None, reset: Tensor | None) -> tuple[Tensor, ...]:
        first = plan.unguarded()
        states, gain, outcome = forward_sweep(drive, weight, initial, reset, leak_rate, first, with_gain=True)
        assert gain is not None
        return states, gain, outcome.final, outcome.residual

    states, gain, final, residual = replayed(run, (drive, weight, initial, reset), ("forward", leak_rate, plan))
    if plan.chunk_length >= drive.shape[1] or plan.accepts(residual):
        return states, gain, Outcome(final, residual, repair_passes=0, fell_back=False)
    return forward_sweep(drive, weight, initial, reset, leak_rate, plan, with_gain=True)


def graphed_backward_sweep(
    grad_states: Tensor,
    grad_final: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
) -> tuple[Tensor, Outcome]:
    """`backward_sweep`, its first pass replayed from a CUDA graph; launched anew only if that needs repair."""

    def run(
        grad_states: Tensor, grad_final: Tensor | None, gain: Tensor, weight: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, ...]:
        delta, outcome = backward_sweep(grad_states, grad_final, gain, weight, reset, leak_rate, plan.unguarded())
        return delta, outcome.final, outcome.residual

    inputs = (grad_states, grad_final, gain, weight, reset)
    delta, final, residual = replayed(run, inputs, ("backward", leak_rate, plan))
    if plan.chunk_length >= gain.shape[1] or plan.accepts(residual):
        return delta, Outcome(final, residual, repair_passes=0, fell_back=False)
    return backward_sweep(grad_states, grad_final, gain, weight, reset, leak_rate, plan)


def weight_gradient(delta: Tensor, states: Tensor, initial: Tensor | None, reset: Tensor | None) -> Tensor:
    """dW = sum over b, t of delta_t c_t^T, `[R, N, N]` in the compute dtype: c_t is the state before t, zero at a
    reset, the initial state at t = 0.  One product over views shifted by one position."""
    wide = compute_dtype(delta)
    first, following = delta[:, 0], delta[1:, 0]
    if reset is not None:
        first = first.masked_fill(reset[:, 0, None, None], 0)
        cut = reset.clone()
        cut[:, 0] = True  # the shift must not cross from one sequence into the next
        delta = delta.masked_fill(cut[:, :, None, None], 0)
    left = delta.flatten(0, 1)[1:].permute(1, 2, 0)  # [R, N, B*T - 1]
    right = states.flatten(0, 1)[:-1].permute(1, 0, 2)  # [R, B*T - 1, N]
    if delta.is_cuda and delta.dtype != wide:
        gradient = torch.bmm(left, right, out_dtype=wide)
    else:
        gradient = torch.bmm(left.to(wide), right.to(wide))
    if reset is None and len(delta) > 1:
        # What crosses from one sequence into the next is taken back: cheaper than a masked copy of delta.
        gradient -= torch.einsum("brn,brm->rnm", following.to(wide), states[:-1, -1].to(wide))
    if initial is not None:
        exchanged = initial.to(delta.dtype).to(wide)
        gradient += torch.einsum("brn,brm->rnm", first.to(wide), exchanged)
    return gradient


def _comparison(
    device: torch.device, dtype: torch.dtype, num_units: int, num_rows: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Both sweeps with fused steps and in fp32 without, in three chunks a sequence that are all exact."""
    batch = num_rows // 3
    drive, grad = (draw(seed, batch, 12, 2, num_units, device=device, dtype=dtype) for seed in (0, 1))
    weight = draw(2, 2, num_units, num_units, device=device, dtype=dtype) / num_units**0.5
    reset = torch.zeros(batch, 12, dtype=torch.bool, device=device)
    reset[1, 7] = True
    plan = ChunkPlan(4, 8, math.inf, 0)

    def sweeps(backend: Backend, *inputs: Tensor) -> tuple[Tensor, ...]:
        drive, grad, weight = inputs
        states, gain, _ = forward_sweep(drive, weight, None, reset, 0.3, plan, with_gain=True, backend=backend)
        assert gain is not None
        return states, gain, backward_sweep(grad, None, gain, weight, reset, 0.3, plan, backend=backend)[0]

    got, want = sweeps("triton", drive, grad, weight), sweeps("reference", drive.float(), grad.float(), weight.float())
    yield from zip(("the states", "the gain", "delta"), got, want, strict=True)


def gain_statistics(gain: Tensor) -> Tensor:
    """fp32 `[2]`: the share of units and positions with |tanh| > 0.95, and the mean gain."""
    saturated = torch.count_nonzero(gain < SATURATED_BELOW).float() / gain.numel()
    return torch.stack([saturated, gain.mean(dtype=compute_dtype(gain)).float()])


def solve(
    grid: ChunkGrid,
    advance: Callable[[Tensor, int, bool], Tensor],
    initial: Tensor,
    reset_windows: Tensor | None,
    plan: ChunkPlan,
) -> Outcome:
    """Warm up, run the chunks, and repair until the boundaries agree.

    `advance(carry, step, record)` takes all chunks through one step and returns the new carry without changing the
    old one; nor is what it returned changed before it is given back.  `initial` is `[R, B, N]`.  Reads one number back
    from the device per pass if there is a boundary.
    """
    first, last = grid.chain(0), grid.chain(-1)
    start = initial.new_zeros(*initial.shape[:2], grid.num_chunks, initial.shape[2])
    for step in range(-grid.warmup, 0):
        if step % grid.length == 0:
            # This chunk's warm-up passes the start of the sequence now; up to here it has seen only padding.
            start = start.clone()
            start[:, :, grid.chain(-step // grid.length)] = initial
        start = advance(start, step, False)
    start = start.clone()
    start[:, :, first] = initial

    first_residual, repair_passes = None, 0
    last_step = grid.length - 1 - grid.padding
    while True:
        end, final = start, initial
        for step in range(grid.length):
            end = advance(end, step, True)
            if step == last_step:
                final = end[:, :, last]
        residual = boundary_residual(grid, start, end, reset_windows)
        first_residual = residual if first_residual is None else first_residual
        agreed = grid.num_chunks == 1 or plan.accepts(residual)
        if agreed or repair_passes == plan.max_repair_passes:
            return Outcome(final, first_residual.float(), repair_passes, fell_back=not agreed)
        received, sent = grid.handed_over(start, end)  # start is no longer what `advance` returned last
        received.copy_(sent)
        repair_passes += 1


def boundary_residual(grid: ChunkGrid, start: Tensor, end: Tensor, reset_windows: Tensor | None) -> Tensor:
    """`relative_mismatch` at the boundaries between chunks; those between documents do not count."""
    cut = None if reset_windows is None or grid.num_chunks == 1 else grid.boundary_is_cut(reset_windows)
    return relative_mismatch(*grid.handed_over(start, end), cut)


def relative_mismatch(received: Tensor, sent: Tensor, cut: Tensor | None) -> Tensor:
    """Per reservoir `[R]`: max ||received - sent|| / mean ||sent|| over boundaries, `[R, B, C - 1, N]` each, of which
    those where `cut`, bool `[1, B, C - 1]`, do not count.  0 where there is none.

    Norms are float64, because squares of small gradients leave the range of fp32 long before the gradients do.
    """
    if received.shape[2] == 0:
        return received.new_zeros(received.shape[0])
    wide = widest(sent.device)
    error, size = (torch.linalg.vector_norm(x, dim=-1, dtype=wide) for x in (received - sent, sent))
    count = error[0].numel()
    if cut is not None:
        error, size = error.masked_fill(cut, 0), size.masked_fill(cut, 0)
        count = (~cut).sum().clamp_min(1)
    mean_size = size.sum(dim=(1, 2)) / count
    return error.amax(dim=(1, 2)) / mean_size.clamp_min(torch.finfo(wide).tiny)


def compute_dtype(drive: Tensor) -> torch.dtype:
    """Of carried states and accumulation: float64 if drive is, else float32."""
    return torch.promote_types(drive.dtype, torch.float32)


def start_state(drive: Tensor, initial: Tensor | None) -> Tensor:
    """`[B, R, N]` as `[R, B, N]` in the compute dtype; zeros for None."""
    if initial is None:
        batch, _, num_reservoirs, num_units = drive.shape
        return torch.zeros(num_reservoirs, batch, num_units, dtype=compute_dtype(drive), device=drive.device)
    return initial.to(compute_dtype(drive)).transpose(0, 1)


def exchange_weight(weight: Tensor, drive: Tensor, fused: bool) -> Tensor:
    """W rounded to drive's dtype, stored as `exchange_product`, or a kernel where `fused`, multiplies it."""
    rounded = weight.to(drive.dtype).contiguous()
    return rounded if drive.is_cuda or fused else rounded.to(compute_dtype(drive))


def exchange_product(rounded: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`rounded [R, B, C, N] @ weight [R, N, N]`, both in the exchange dtype, accumulated and returned in `dtype`.

    A CPU has no such product in bf16 (its result is rounded as well), so there the rounded values are multiplied in
    fp32, which is the same arithmetic.
    """
    rows = rounded.flatten(1, 2)
    if not rounded.is_cuda or rounded.dtype == dtype:
        product = torch.bmm(rows.to(dtype), weight)
    else:
        product = torch.bmm(rows, weight, out_dtype=dtype)
    return product.view_as(rounded)
