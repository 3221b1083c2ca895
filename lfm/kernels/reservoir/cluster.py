"""The chunked recurrence as one CUDA launch per sweep, `cluster.cu`, for Hopper GPUs: compiled at first use, checked
against the reference before it is trusted.  Same arguments and results as the sweeps of `chunked.py`.

The residual is judged, and repairs decided, on the device: the host enqueues a whole solve and waits for nothing, so a
CUDA graph may hold all of it.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.nvcc import HOPPER_FLAGS, compile_library, runs
from lfm.kernels.reservoir.grid import SATURATED_BELOW, ChunkGrid, ChunkPlan, Outcome
from lfm.kernels.reservoir.self_test import require_agreement

SOURCE = Path(__file__).with_name("cluster.cu")

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
    return runs(_prepare, device, "the reservoir recurrence takes its slower chunked path")


def forward_sweep(
    drive: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    *,
    with_gain: bool,
    with_statistics: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Outcome]:
    """As `chunked.forward_sweep`, and nothing waits for the device.  Third: fp32 `[2]`, what `gain_statistics` of
    `chunked.py` says of the gain, whether that is kept or not."""
    drive, weight = _dense(drive), _dense(weight.to(drive.dtype))
    initial, reset = _given(initial), None if reset is None else _dense(reset)
    cut = _cut(drive.shape[1], plan)
    states, gain, final, *verdict, statistics = forward_op(
        drive, weight, initial, reset, leak_rate, *cut, with_gain, with_statistics
    )
    outcome = Outcome(final.transpose(0, 1), *verdict)
    return states, gain if with_gain else None, statistics if with_statistics else None, outcome


def backward_sweep(
    grad_states: Tensor,
    grad_final: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
) -> tuple[Tensor, Outcome]:
    """As `chunked.backward_sweep`, and nothing waits for the device."""
    grad_states, gain, weight = _dense(grad_states.to(gain.dtype)), _dense(gain), _dense(weight.to(gain.dtype))
    initial, reset = _given(grad_final), None if reset is None else _dense(reset)
    cut = _cut(gain.shape[1], plan)
    delta, final, *verdict = backward_op(grad_states, gain, weight, initial, reset, leak_rate, *cut)
    return delta, Outcome(final.transpose(0, 1), *verdict)


def _cut(num_positions: int, plan: ChunkPlan) -> tuple[int, int, float, int]:
    grid = ChunkGrid(num_positions, plan, reverse=False)
    return grid.length, grid.warmup, plan.tolerance, plan.max_repair_passes


def _dense(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary, as the kernel's vectors need it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _given(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


_PLAN = "float leak_rate, int chunk_length, int warmup, float tolerance, int max_repair_passes"


@torch.library.custom_op(
    "lfm::reservoir_forward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor drive, Tensor weight, Tensor? initial, Tensor? reset, {_PLAN}, bool with_gain, "
    "bool with_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(
    drive: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    chunk_length: int,
    warmup: int,
    tolerance: float,
    max_repair_passes: int,
    with_gain: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A whole solve.  drive `[B, T, R, N]` and weight `[R, N, N]` bf16; initial `[B, R, N]` fp32.

    Returns states, gain, the final state `[B, R, N]`, residual `[R]`, repair passes, whether it fell back, and
    `[2]` statistics of the gain; gain and statistics are empty unless asked for.
    """
    outputs = _forward_outputs(drive, with_gain, with_statistics)
    cut = (leak_rate, chunk_length, warmup, tolerance, max_repair_passes)
    solve(drive, None, weight, initial, reset, outputs, *cut)
    return outputs


@torch.library.custom_op(
    "lfm::reservoir_backward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor grad_states, Tensor gain, Tensor weight, Tensor? grad_final, Tensor? reset, {_PLAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_states: Tensor,
    gain: Tensor,
    weight: Tensor,
    grad_final: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    chunk_length: int,
    warmup: int,
    tolerance: float,
    max_repair_passes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A whole solve.  grad_states and gain `[B, T, R, N]`, weight `[R, N, N]` bf16; grad_final `[B, R, N]` fp32.

    Returns delta, the gradient of the initial state `[B, R, N]`, and the verdict as `forward_op`.
    """
    delta, *ending = outputs = _backward_outputs(gain)
    cut = (leak_rate, chunk_length, warmup, tolerance, max_repair_passes)
    solve(grad_states, gain, weight, grad_final, reset, (delta, None, *ending, None), *cut)
    return outputs


def _backward_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, num_reservoirs, num_units = x.shape
    final = x.new_empty(batch, num_reservoirs, num_units, dtype=torch.float32)
    residual, repair_passes = x.new_empty(num_reservoirs, dtype=torch.float32), x.new_empty((), dtype=torch.int32)
    return torch.empty_like(x), final, residual, repair_passes, x.new_empty((), dtype=torch.bool)


def _forward_outputs(
    drive: Tensor, with_gain: bool, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    states, final, residual, repair_passes, fell_back = _backward_outputs(drive)
    gain = torch.empty_like(drive) if with_gain else drive.new_empty(0)
    statistics = drive.new_empty(2 * with_statistics, dtype=torch.float32)
    return states, gain, final, residual, repair_passes, fell_back, statistics


@forward_op.register_fake
def _(drive, weight, initial, reset, leak, length, warmup, tolerance, repairs, with_gain, with_statistics):
    return _forward_outputs(drive, with_gain, with_statistics)


@backward_op.register_fake
def _(grad_states, gain, weight, grad_final, reset, leak, length, warmup, tolerance, repairs):
    return _backward_outputs(gain)


def solve(
    inputs: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    outputs: Sequence[Tensor | None],
    leak_rate: float,
    chunk_length: int,
    warmup: int,
    tolerance: float,
    max_repair_passes: int,
    *,
    columns: int | None = None,
) -> None:
    """Enqueue one solve on the current stream, backward where a gain is given.

    It writes `outputs`: states or delta, gain, final, residual, repair passes, whether it fell back, statistics.
    """
    batch, num_positions, num_reservoirs, num_units = inputs.shape
    device, backward = inputs.device, gain is not None
    shape = (num_reservoirs, num_units, device, backward)
    exact_columns = columns or columns_of_a_cluster(batch, *shape)
    columns = columns or columns_of_a_cluster(batch * -(-num_positions // chunk_length), *shape)
    sizes = (batch, num_positions, num_reservoirs, num_units, chunk_length)
    scratch = inputs.new_empty(library().reservoir_scratch_bytes(*sizes), dtype=torch.uint8)
    given = (weight, inputs, gain, initial, reset, *outputs, scratch)
    for x in given:
        assert x is None or (x.is_contiguous() and x.device == device)
    pointers = [None if x is None or x.numel() == 0 else x.data_ptr() for x in given]
    numbers = (max_repair_passes, leak_rate, SATURATED_BELOW, tolerance)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        widths = (backward, columns, exact_columns)
        error = library().reservoir_solve(device.index, *widths, *pointers, *sizes, warmup, *numbers, stream)
    _check(error)


def fill_chunk_length(shape: torch.Size, warmup: int, device: torch.device) -> int:
    """The chunk length with which one wave of clusters holds every chunk of a `[B, T, R, N]` drive and takes the
    least time."""
    batch, num_positions, num_reservoirs, num_units = shape

    def length(columns: int) -> int:
        resident = min(resident_clusters(device.index, backward, columns, num_units) for backward in (False, True))
        num_chunks = max(1, resident // num_reservoirs * columns // batch)
        return -(-num_positions // num_chunks)

    return length(min(STEP_COST, key=lambda columns: (length(columns) + warmup) * STEP_COST[columns]))


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
    library = ctypes.CDLL(str(compile_library(SOURCE, HOPPER_FLAGS)))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.reservoir_scratch_bytes.argtypes = [integer] * 5
    library.reservoir_scratch_bytes.restype = ctypes.c_size_t
    library.reservoir_solve.argtypes = (
        [integer] * 4 + [pointer] * 13 + [integer] * 7 + [ctypes.c_float] * 2 + [ctypes.c_double, pointer]
    )
    library.reservoir_resident_clusters.argtypes = [integer] * 4 + [ctypes.POINTER(integer)]
    library.reservoir_error.restype = ctypes.c_char_p
    return library


def _prepare(device: torch.device) -> None:
    for num_units in NUM_UNITS:  # loads every kernel, which must not happen while a CUDA graph is being captured
        for columns in STEP_COST:
            for backward in (False, True):
                resident_clusters(device.index, backward, columns, num_units)

    def forward(*args: Any, with_gain: bool) -> tuple[Tensor, Tensor, Outcome]:
        states, gain, _, outcome = forward_sweep(*args, with_gain=with_gain)
        assert gain is not None
        return states, gain, outcome

    require_agreement(forward, backward_sweep, 512, device, torch.bfloat16, bound=1e-2)
