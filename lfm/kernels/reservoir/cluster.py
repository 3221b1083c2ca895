"""The chunked recurrence as one CUDA launch per sweep, `cluster.cu`, for Hopper GPUs: compiled at first use, checked
against the reference before it is trusted.  Same signatures and results as the sweeps of `chunked.py`.

States handed between chunks are `[B, C, R, N]` fp32 here, with chunks in the order of the chain: forward chunk 0
begins the sequence, backward chunk 0 ends it.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lfm.kernels.nvcc import Unavailable, compile_library
from lfm.kernels.reservoir.chunked import ChunkGrid, ChunkPlan, Outcome, relative_mismatch
from lfm.kernels.reservoir.reference import reservoir_recurrence_reference

SOURCE = Path(__file__).with_name("cluster.cu")
NVCC_FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")

NUM_UNITS = (256, 512)
"""Reservoir sizes the kernel is compiled for."""
STEP_COST = {8: 1.3, 16: 2.2}
"""Chunks a cluster advances together -> microseconds of a step on an H200.  Only the time depends on it."""


def supports(x: Tensor) -> bool:
    """Whether the kernel takes `[B, T, R, N]` of this dtype on this device; compiles it if so.  Otherwise one warning
    says why a GPU with the right numbers goes without."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] in NUM_UNITS and available(x.device)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel runs, and runs right, on this device; a warning says why not."""
    try:
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            raise Unavailable(f"{torch.cuda.get_device_name(device)} has compute capability {capability}, not (9, 0)")
        library()
        _self_test(device)
    except (Unavailable, OSError, RuntimeError) as error:
        warnings.warn(
            f"the reservoir recurrence takes its slower chunked path on {device}, without the cluster kernel: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def forward_sweep(
    drive: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    *,
    with_gain: bool,
) -> tuple[Tensor, Tensor | None, Outcome]:
    """As `chunked.forward_sweep`."""
    drive, weight = _dense(drive), _dense(weight.to(drive.dtype))
    initial, reset = _given(initial), None if reset is None else _dense(reset)

    def run(plan: ChunkPlan, starts: Tensor | None) -> tuple[Tensor, ...]:
        length, warmup = _cut(drive.shape[1], plan)
        return forward_op(drive, weight, initial, starts, reset, leak_rate, length, warmup, with_gain)

    cut = None if reset is None else reset[:, plan.chunk_length :: plan.chunk_length]
    (states, gain), outcome = _solve(run, drive.shape[1], plan, cut)
    return states, gain if with_gain else None, outcome


def backward_sweep(
    grad_states: Tensor,
    grad_final: Tensor,
    gain: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
) -> tuple[Tensor, Outcome]:
    """As `chunked.backward_sweep`."""
    num_positions = gain.shape[1]
    grad_states, gain = _dense(grad_states.to(gain.dtype)), _dense(gain)
    weight_transposed = _dense(weight.to(gain.dtype).transpose(1, 2))
    initial, reset = _given(grad_final), None if reset is None else _dense(reset)

    def run(plan: ChunkPlan, starts: Tensor | None) -> tuple[Tensor, ...]:
        length, warmup = _cut(num_positions, plan)
        return backward_op(grad_states, gain, weight_transposed, initial, starts, reset, leak_rate, length, warmup)

    cut = None
    if reset is not None:
        # Chunk j of the chain begins right below position num_positions - j * chunk_length, the later side.
        first = num_positions - (num_positions - 1) // plan.chunk_length * plan.chunk_length
        cut = reset[:, first :: plan.chunk_length].flip(1)
    (delta,), outcome = _solve(run, num_positions, plan, cut)
    return delta, outcome


def _cut(num_positions: int, plan: ChunkPlan) -> tuple[int, int]:
    grid = ChunkGrid(num_positions, plan, reverse=False)
    return grid.length, grid.warmup


def _solve(
    run: Callable[[ChunkPlan, Tensor | None], tuple[Tensor, ...]],
    num_positions: int,
    plan: ChunkPlan,
    cut: Tensor | None,
) -> tuple[tuple[Tensor, ...], Outcome]:
    """Run the chunks and repair until the boundaries agree, as `chunked.solve`.

    `run(plan, starts)` returns its outputs, then what each chunk started from and ended in; `cut` is bool
    `[B, C - 1]`.  Reads one number back from the device per pass if there is a boundary.
    """
    *outputs, start, end = run(plan, None)
    first_residual, repair_passes, fell_back = None, 0, False
    while True:
        received, sent = start[:, 1:], end[:, :-1]
        sides = (received.permute(2, 0, 1, 3), sent.permute(2, 0, 1, 3))
        residual = relative_mismatch(*sides, None if cut is None else cut[None])
        first_residual = residual if first_residual is None else first_residual
        if received.shape[1] == 0 or plan.accepts(residual):
            break
        if repair_passes == plan.max_repair_passes:
            fell_back = True
            *outputs, _, end = run(plan.sequential(num_positions), None)
            break
        *outputs, start, end = run(_without_warmup(plan), torch.cat([start[:, :1], sent], dim=1))
        repair_passes += 1
    final = end[:, -1].transpose(0, 1)
    return tuple(outputs), Outcome(final, first_residual.float(), repair_passes, fell_back)


def _without_warmup(plan: ChunkPlan) -> ChunkPlan:
    return ChunkPlan(plan.chunk_length, 0, plan.tolerance, plan.max_repair_passes)


def _dense(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary, as the kernel's vectors need it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _given(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


@torch.library.custom_op(
    "lfm::reservoir_forward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor drive, Tensor weight, Tensor? initial, Tensor? starts, Tensor? reset, float leak_rate, "
    "int chunk_length, int warmup, bool with_gain) -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(
    drive: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    starts: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    chunk_length: int,
    warmup: int,
    with_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass.  drive `[B, T, R, N]` and weight `[R, N, N]` bf16; initial `[B, R, N]`, starts `[B, C, R, N]` fp32.

    Returns states, gain (empty without `with_gain`), and `[B, C, R, N]` what each chunk started from and ended in.
    """
    states, gain, start, end = _forward_outputs(drive, chunk_length, with_gain)
    launch(drive, None, weight, states, gain, initial, starts, reset, start, end, leak_rate, chunk_length, warmup)
    return states, gain, start, end


@torch.library.custom_op(
    "lfm::reservoir_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad_states, Tensor gain, Tensor weight_transposed, Tensor? grad_final, Tensor? starts, "
    "Tensor? reset, float leak_rate, int chunk_length, int warmup) -> (Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_states: Tensor,
    gain: Tensor,
    weight_transposed: Tensor,
    grad_final: Tensor | None,
    starts: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    chunk_length: int,
    warmup: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass.  grad_states and gain `[B, T, R, N]`, weight_transposed `[R, N, N]` bf16; the rest as `forward_op`.

    Returns delta and `[B, C, R, N]` what each chunk started from and ended in, along the chain.
    """
    delta, start, end = _backward_outputs(gain, chunk_length)
    args = (grad_final, starts, reset, start, end, leak_rate, chunk_length, warmup)
    launch(grad_states, gain, weight_transposed, delta, None, *args)
    return delta, start, end


def _boundary_states(x: Tensor, chunk_length: int) -> Tensor:
    batch, num_positions, num_reservoirs, num_units = x.shape
    num_chunks = -(-num_positions // chunk_length)
    return x.new_empty(batch, num_chunks, num_reservoirs, num_units, dtype=torch.float32)


def _forward_outputs(drive: Tensor, chunk_length: int, with_gain: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start, end = (_boundary_states(drive, chunk_length) for _ in range(2))
    return torch.empty_like(drive), torch.empty_like(drive) if with_gain else drive.new_empty(0), start, end


def _backward_outputs(gain: Tensor, chunk_length: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gain), _boundary_states(gain, chunk_length), _boundary_states(gain, chunk_length)


@forward_op.register_fake
def _(drive, weight, initial, starts, reset, leak_rate, chunk_length, warmup, with_gain):
    return _forward_outputs(drive, chunk_length, with_gain)


@backward_op.register_fake
def _(grad_states, gain, weight_transposed, grad_final, starts, reset, leak_rate, chunk_length, warmup):
    return _backward_outputs(gain, chunk_length)


def launch(
    inputs: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    outputs: Tensor,
    gain_output: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    reset: Tensor | None,
    start: Tensor,
    end: Tensor,
    leak_rate: float,
    chunk_length: int,
    warmup: int,
    *,
    columns: int | None = None,
) -> None:
    """Start one sweep on the current stream, backward where a gain is given; writes the last two of each pair."""
    batch, num_positions, num_reservoirs, num_units = inputs.shape
    device, backward = inputs.device, gain is not None
    num_columns = batch * start.shape[1]
    if columns is None:
        columns = columns_of_a_cluster(num_columns, num_reservoirs, num_units, device, backward)
    given = (weight, inputs, gain, outputs, gain_output, initial, starts, reset, start, end)
    for x in given:
        assert x is None or (x.is_contiguous() and x.device == device)
    pointers = [None if x is None or x.numel() == 0 else x.data_ptr() for x in given]
    sizes = (batch, num_positions, num_reservoirs, num_units, chunk_length, warmup)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        error = library().reservoir_sweep_launch(device.index, backward, columns, *pointers, *sizes, leak_rate, stream)
    _check(error)


def columns_of_a_cluster(
    num_columns: int, num_reservoirs: int, num_units: int, device: torch.device, backward: bool
) -> int:
    """How many chunks a cluster advances together: what takes the least time for the waves of clusters needed."""

    def cost(columns: int) -> float:
        clusters = -(-num_columns // columns) * num_reservoirs
        waves = -(-clusters // resident_clusters(device.index, backward, columns, num_units))
        return waves * STEP_COST[columns]

    return min(STEP_COST, key=cost)


@functools.cache
def resident_clusters(device_index: int, backward: bool, columns: int, num_units: int) -> int:
    """How many clusters of such a sweep the device holds at once."""
    found = ctypes.c_int(0)
    with torch.cuda.device(device_index):
        _check(library().reservoir_resident_clusters(device_index, backward, columns, num_units, ctypes.byref(found)))
    return found.value


def _check(error: int) -> None:
    if error != 0:
        reason = library().reservoir_error(error).decode()
        raise RuntimeError(f"the reservoir's cluster kernel: CUDA error {error}, {reason}")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; compiles it unless one of this source is in torch's cache of extensions."""
    library = ctypes.CDLL(str(compile_library(SOURCE, NVCC_FLAGS)))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.reservoir_sweep_launch.argtypes = [integer] * 3 + [pointer] * 10 + [integer] * 6 + [ctypes.c_float, pointer]
    library.reservoir_resident_clusters.argtypes = [integer] * 4 + [ctypes.POINTER(integer)]
    library.reservoir_error.restype = ctypes.c_char_p
    return library


def _self_test(device: torch.device) -> None:
    """Both sweeps against the reference, with a warm-up, a reset, padding and repairs."""
    for num_units in NUM_UNITS:  # loads every kernel, which must not happen while a CUDA graph is being captured
        for columns in STEP_COST:
            for backward in (False, True):
                resident_clusters(device.index, backward, columns, num_units)

    generator = torch.Generator().manual_seed(0)
    batch, num_positions, num_reservoirs, num_units = shape = (2, 21, 2, 512)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.inference_mode(False), torch.enable_grad():
        drive, grad_states = normal(*shape).bfloat16(), normal(*shape).bfloat16()
        weight = (normal(num_reservoirs, num_units, num_units) / num_units**0.5).bfloat16()
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
        assert gain is not None
        grad_states, grad_final = grad_states.to(device), grad_final.to(device)
        delta, backward = backward_sweep(grad_states, grad_final, gain, weight, reset, 0.3, plan)
        found = (states, forward.final.transpose(0, 1), delta, backward.final.transpose(0, 1))
        for name, got, right in zip(("states", "final", "delta", "mu"), found, (*want, *grads), strict=True):
            error = float((got.cpu().double() - right.detach()).norm() / right.detach().norm())
            if not error < 1e-2:
                raise Unavailable(f"its {name} are off by {error:.1e} of their norm on a test problem")
        if forward.fell_back or backward.fell_back:
            raise Unavailable("its chunks did not agree on a test problem after repairing all of them")
