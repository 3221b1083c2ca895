"""One timed thing of `launch/bench.py`: what runs, what it must equal, and what no version could beat."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

COPY_BYTES_PER_SECOND = 4.25e12
MATMUL_FLOPS_PER_SECOND = 784e12
"""bf16.  Both measured on an H200: a large copy, reads and writes counted, and a large matrix product."""
FP32_FLOPS_PER_SECOND = 67e12
"""Of an H200 without its matrix units, by its datasheet."""

FloorKind = Literal["bytes", "flops"]


@dataclass(frozen=True)
class Case:
    """Cases of one op may share inputs, made when first needed."""

    name: str
    run: Callable[[], object]
    """Starts the work on the current stream."""
    check: Callable[[], dict[str, float]]
    """Output -> norm of its error over its norm, against a more precise reference.  Only if all are within `limits`,
    which names the same outputs, time is taken."""
    limits: dict[str, float]
    floor_seconds: float
    floor_kind: FloorKind
    flops: float
    bytes: float
    """The fewest: each input read once, each output written once."""
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    """Other ways to the same result."""


def norm_ratio(got: Tensor, want: Tensor) -> float:
    """Norm of the error over the norm of what is right."""
    right = want.double()
    return float((got.double() - right).norm() / right.norm())


def floor(flops: float, bytes: float) -> tuple[float, FloorKind]:
    """Seconds below which nothing of so many bf16 matmul FLOPs and bytes goes, and which of the two says so."""
    compute, traffic = flops / MATMUL_FLOPS_PER_SECOND, bytes / COPY_BYTES_PER_SECOND
    return (compute, "flops") if compute > traffic else (traffic, "bytes")


def rate(kind: FloorKind, flops: float, bytes: float, seconds: float) -> str:
    """What was reached of that which sets the floor."""
    return f"{flops / seconds / 1e12:.0f} TFLOP/s" if kind == "flops" else f"{bytes / seconds / 1e12:.2f} TB/s"


def graphed(run: Callable[[int], object], count: int = 1) -> Callable[[], object]:
    """Replays `run(0)` to `run(count - 1)` in turn, one a call, from CUDA graphs recorded by the first call: the
    device's time alone, as in a training step, where the host is ahead of it."""

    @functools.cache
    def replays() -> itertools.cycle:
        graphs = []
        for index in range(count):
            run(index)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(index)
            graphs.append(graph)
        return itertools.cycle(graphs)

    return lambda: next(replays()).replay()
