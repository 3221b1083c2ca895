"""The gradients of the liquid layer's two biases, at LFM-3B's widths."""

import functools

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.column_sum.kernel import column_sum_kernel

SHAPES = ((8192, 1536), (8192, 3072), (65536, 1536), (65536, 3072))


@functools.cache
def inputs(shape: tuple[int, int]) -> list[Tensor]:
    """Enough of them that none is still in the cache when its turn comes again."""
    generator = torch.Generator("cuda").manual_seed(0)
    count = max(1, 2**28 // (2 * shape[0] * shape[1]))
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(count)]


def case(shape: tuple[int, int]) -> Case:
    def check() -> dict[str, float]:
        x = inputs(shape)[0]
        return {"sum": norm_ratio(column_sum_kernel(x), x.double().sum(0))}

    count = len(inputs(shape))
    moved = 2.0 * shape[0] * shape[1]
    return Case(
        f"column sum {shape[0]} x {shape[1]}",
        graphed(lambda i: column_sum_kernel(inputs(shape)[i]), count),
        check,
        {"sum": 3e-3},
        *floor(0, moved),
        0,
        moved,
        {"plain PyTorch": graphed(lambda i: inputs(shape)[i].sum(0), count)},
    )


def cases() -> list[Case]:
    return [case(shape) for shape in SHAPES]
