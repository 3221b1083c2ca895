"""Which sweeps compute a call of the recurrence: one choice for both directions, by device, dtype, size and plan."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from lfm.kernels.recording import is_recording
from lfm.kernels.reservoir import cluster, cluster_fp32
from lfm.kernels.reservoir.chunked import (
    backward_sweep,
    forward_sweep,
    gain_statistics,
    graphed_backward_sweep,
    graphed_forward_sweep,
)
from lfm.kernels.reservoir.grid import ChunkPlan, Outcome

_MOST_GRAPHED_STEPS = 1024
"""Dependent steps of one to seven kernels each; a graph of more takes long to make."""
_CHUNK_LENGTH = 128
"""Of `fill_chunk_length` where no cluster kernel runs."""


class Forward(Protocol):
    """States and, if asked for or needed, gain `[B, T, R, N]`, fp32 `[2]` `gain_statistics` if asked for, and how the
    sweep ended; arguments as of `chunked.forward_sweep`."""

    def __call__(
        self,
        drive: Tensor,
        weight: Tensor,
        initial: Tensor | None,
        reset: Tensor | None,
        leak_rate: float,
        plan: ChunkPlan,
        /,
        *,
        with_gain: bool,
        with_statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Outcome]: ...


Backward = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, ChunkPlan], tuple[Tensor, Outcome]]
"""As `chunked.backward_sweep`."""


class Path(NamedTuple):
    name: str
    applies: Callable[[Tensor, ChunkPlan, bool], bool]
    """Whether it takes this drive `[B, T, R, N]`, cut by this plan; the last: whether a backward is to follow."""
    forward: Forward
    backward: Backward


def choose(drive: Tensor, plan: ChunkPlan, *, with_backward: bool) -> Path:
    """The first of PATHS that applies: the fastest.  Compiles and tests its kernels at a process's first call."""
    return next(path for path in PATHS if path.applies(drive, plan, with_backward))


def fill_chunk_length(drive: Tensor, warmup: int) -> int:
    """The chunk length with which one wave of the device's clusters holds all chunks of `[B, T, R, N]`; 128 where no
    such kernel runs."""
    on_clusters = cluster.supports(drive)
    return cluster.fill_chunk_length(drive.shape, warmup, drive.device) if on_clusters else _CHUNK_LENGTH


def _counting(sweep: Callable[..., tuple[Tensor, Tensor | None, Outcome]]) -> Forward:
    """A sweep that does not count statistics itself, with those of its gain."""

    def forward(
        *inputs: object, with_gain: bool, with_statistics: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Outcome]:
        states, gain, outcome = sweep(*inputs, with_gain=with_gain or with_statistics)
        if not with_statistics:
            return states, gain, None, outcome
        assert gain is not None
        return states, gain, gain_statistics(gain), outcome

    return forward


def _is_worth_a_graph(drive: Tensor, plan: ChunkPlan, with_backward: bool) -> bool:
    """Whether one step loop is worth a CUDA graph, and not too long for one; only training's shapes repeat.

    A step that is recorded whole has it in its own.
    """
    steps = min(plan.chunk_length + plan.warmup, drive.shape[1])
    return with_backward and drive.is_cuda and not is_recording() and 1 < steps <= _MOST_GRAPHED_STEPS


PATHS = (
    Path(
        "cluster",
        lambda drive, plan, with_backward: cluster.supports(drive),
        cluster.forward_sweep,
        cluster.backward_sweep,
    ),
    Path(
        "cluster_fp32",
        lambda drive, plan, with_backward: cluster_fp32.supports(drive),
        _counting(cluster_fp32.forward_sweep),
        cluster_fp32.backward_sweep,
    ),
    Path(
        "graphed",
        _is_worth_a_graph,
        _counting(lambda *inputs, with_gain: graphed_forward_sweep(*inputs)),
        graphed_backward_sweep,
    ),
    Path("chunked", lambda drive, plan, with_backward: True, _counting(forward_sweep), backward_sweep),
)
