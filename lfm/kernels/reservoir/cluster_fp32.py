"""The chunked recurrence in fp32 as one CUDA launch per sweep, `cluster_fp32.cu`, for Hopper GPUs: compiled at first
use, checked against the reference before it is trusted.  Same signatures and results as the sweeps of `chunked.py`.

States handed between chunks are `[B, C, R, N]` here, with chunks in the order of the chain: forward chunk 0 begins the
sequence, backward chunk 0 ends it.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.nvcc import HOPPER_FLAGS, compile_library, runs
from lfm.kernels.reservoir.chunked import relative_mismatch
from lfm.kernels.reservoir.grid import ChunkGrid, ChunkPlan, Outcome
from lfm.kernels.reservoir.self_test import require_agreement

SOURCE = Path(__file__).with_name("cluster_fp32.cu")

STEP_COST = {
    128: {1: 0.62, 2: 0.72, 4: 1.28},
    256: {1: 0.71, 2: 0.90, 4: 1.39, 8: 3.0},
    512: {1: 0.77, 2: 1.07, 4: 1.77, 8: 3.0},
}
"""Reservoir size -> chunks a cluster advances together -> microseconds of a step on an H200.  Only the time depends
on how many chunks those are."""


def supports(x: Tensor) -> bool:
    """Whether the kernel takes `[B, T, R, N]` of this dtype on this device; compiles it if so.  Otherwise one warning
    says why a GPU with the right numbers goes without."""
    return x.is_cuda and x.dtype == torch.float32 and x.shape[-1] in STEP_COST and available(x.device)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel runs, and runs right, on this device; a warning says why not."""
    return runs(_prepare, device, "the fp32 reservoir recurrence takes its slower chunked path")


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
    """As `chunked.forward_sweep`; waits for the device only if there is a boundary."""
    drive, weight, initial, reset = _dense(drive, weight, initial, reset)
    states, gain = torch.empty_like(drive), torch.empty_like(drive) if with_gain else None

    def run(plan: ChunkPlan, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        return launch(drive, None, weight, states, gain, initial, starts, reset, leak_rate, plan)

    cut = None if reset is None else reset[:, plan.chunk_length :: plan.chunk_length]
    return states, gain, _solve(run, drive.shape[1], plan, cut)


def backward_sweep(
    grad_states: Tensor,
    grad_final: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
) -> tuple[Tensor, Outcome]:
    """As `chunked.backward_sweep`; waits for the device only if there is a boundary."""
    grad_states, gain, weight, grad_final, reset = _dense(grad_states, gain, weight, grad_final, reset)
    delta, num_positions = torch.empty_like(gain), gain.shape[1]

    def run(plan: ChunkPlan, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        return launch(grad_states, gain, weight, delta, None, grad_final, starts, reset, leak_rate, plan)

    cut = None
    if reset is not None:
        # Chunk j of the chain begins right below position num_positions - j * chunk_length, the later side.
        first = num_positions - (num_positions - 1) // plan.chunk_length * plan.chunk_length
        cut = reset[:, first :: plan.chunk_length].flip(1)
    return delta, _solve(run, num_positions, plan, cut)


def _dense(*tensors: Tensor | None) -> list:
    """Contiguous, and fp32 unless bool."""
    return [None if x is None else (x if x.dtype == torch.bool else x.float()).contiguous() for x in tensors]


def _solve(
    run: Callable[[ChunkPlan, Tensor | None], tuple[Tensor, Tensor]],
    num_positions: int,
    plan: ChunkPlan,
    cut: Tensor | None,
) -> Outcome:
    """Run the chunks and repair until the boundaries agree, as `chunked.solve`.

    `run(plan, starts)` writes the outputs and returns what each chunk started from and ended in; `cut` is bool
    `[B, C - 1]`.  Reads one number back from the device per pass if there is a boundary.
    """
    start, end = run(plan, None)
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
            _, end = run(plan.sequential(num_positions), None)
            break
        start, end = run(replace(plan, warmup=0), torch.cat([start[:, :1], sent], dim=1))
        repair_passes += 1
    return Outcome(end[:, -1].transpose(0, 1), first_residual.float(), repair_passes, fell_back)


def launch(
    inputs: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    outputs: Tensor,
    gain_output: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    reset: Tensor | None,
    leak_rate: float,
    plan: ChunkPlan,
    *,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Start one pass on the current stream, backward where a gain is given; it writes `outputs` and `gain_output`.

    Returns `[B, C, R, N]` what each chunk starts from and ends in.
    """
    batch, num_positions, num_reservoirs, num_units = inputs.shape
    device, backward = inputs.device, gain is not None
    grid = ChunkGrid(num_positions, plan, reverse=backward)
    start, end = (inputs.new_empty(batch, grid.num_chunks, num_reservoirs, num_units) for _ in range(2))
    if columns is None:
        shape = (batch * grid.num_chunks, num_reservoirs, num_units)
        columns = columns_of_a_cluster(*shape, device.index, backward)
    given = (weight, inputs, gain, outputs, gain_output, initial, starts, reset, start, end)
    for x in given:
        assert x is None or (x.is_contiguous() and x.device == device)
    pointers = [None if x is None else x.data_ptr() for x in given]
    sizes = (batch, num_positions, num_reservoirs, num_units, grid.length, grid.warmup)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        error = library().reservoir_sweep_launch(device.index, backward, columns, *pointers, *sizes, leak_rate, stream)
    _check(error)
    return start, end


@functools.lru_cache(maxsize=256)
def columns_of_a_cluster(
    num_columns: int, num_reservoirs: int, num_units: int, device_index: int, backward: bool
) -> int:
    """How many chunks a cluster advances together: what takes the least time for the waves of clusters needed."""
    costs = STEP_COST[num_units]

    def cost(columns: int) -> float:
        clusters = -(-num_columns // columns) * num_reservoirs
        waves = -(-clusters // resident_clusters(device_index, backward, columns, num_units))
        return waves * costs[columns]

    return min(costs, key=cost)


@functools.cache
def resident_clusters(device_index: int, backward: bool, columns: int, num_units: int) -> int:
    """How many clusters of such a sweep the device holds at once."""
    found = ctypes.c_int(0)
    with torch.cuda.device(device_index):
        _check(library().reservoir_resident_clusters(device_index, backward, columns, num_units, ctypes.byref(found)))
    if found.value == 0:
        raise RuntimeError(f"the device holds no cluster of the fp32 reservoir's kernel for {num_units} units")
    return found.value


def _check(error: int) -> None:
    if error != 0:
        reason = library().reservoir_error(error).decode()
        raise RuntimeError(f"the fp32 reservoir's cluster kernel: CUDA error {error}, {reason}")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; compiles it unless one of this source is in torch's cache of extensions."""
    library = ctypes.CDLL(str(compile_library(SOURCE, HOPPER_FLAGS)))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.reservoir_sweep_launch.argtypes = [integer] * 3 + [pointer] * 10 + [integer] * 6 + [ctypes.c_float, pointer]
    library.reservoir_resident_clusters.argtypes = [integer] * 4 + [ctypes.POINTER(integer)]
    library.reservoir_error.restype = ctypes.c_char_p
    return library


def _prepare(device: torch.device) -> None:
    def forward(*args: Any, with_gain: bool) -> tuple[Tensor, Tensor, Outcome]:
        states, gain, outcome = forward_sweep(*args, with_gain=with_gain)
        assert gain is not None
        return states, gain, outcome

    for num_units, costs in STEP_COST.items():  # loads every kernel, which must not happen while a graph is captured
        for columns in costs:
            for backward in (False, True):
                resident_clusters(device.index, backward, columns, num_units)
        require_agreement(forward, backward_sweep, num_units, device, torch.float32, bound=1e-5)
