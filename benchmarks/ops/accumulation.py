"""Adding the bf16 gradient of one layer's experts to its fp32 sum, at LFM-3B's size."""

import functools

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.accumulation.kernel import accumulate_kernel_

SHAPE = (8, 2816, 3072)


@functools.cache
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    total, grad = (torch.randn(SHAPE, generator=generator, device="cuda") for _ in range(2))
    return total, grad.bfloat16()


def check() -> dict[str, float]:
    total, grad = inputs()
    got = total.clone()
    accumulate_kernel_(got, grad, None, True)
    return {"total": norm_ratio(got, total.double() + grad.double())}


def cases() -> list[Case]:
    total, grad = inputs()
    moved = 10.0 * total.numel()
    return [
        Case(
            "accumulation",
            graphed(lambda _: accumulate_kernel_(total, grad, None, True)),
            check,
            {"total": 1e-6},
            *floor(0, moved),
            0,
            moved,
            {"plain PyTorch": graphed(lambda _: total.add_(grad))},
        )
    ]
