"""One AdamW update of a layer's experts with clipping and the bf16 copy, at LFM-3B's size."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.adamw.kernel import adamw_kernel_
from lfm.kernels.adamw.reference import adamw_reference_

SHAPE = (8, 2304, 3072)
LR, SCALE, DECAY = 1e-3, 0.5, 0.1
HOW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decays": [DECAY]}


@functools.cache
def inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.rand(SHAPE, generator=generator, device="cuda") for _ in range(4)]
    return tensors, torch.tensor([1.5, 3.0, SCALE, 0.0], device="cuda")


def lists(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    p, g, m, v = tensors
    return [p], [g], [m], [v]


def check() -> dict[str, float]:
    tensors, shared = inputs()
    got, want = [t.clone() for t in tensors], [t.double() for t in tensors]
    lrs = torch.tensor([LR], device="cuda")
    adamw_kernel_(*lists(got), lrs, shared, **HOW, workings=[None])
    adamw_reference_(*lists(want), lrs.double(), shared.double(), **HOW, workings=[None])
    return {name: norm_ratio(got[i], want[i]) for i, name in ((0, "parameter"), (2, "exp_avg"), (3, "exp_avg_sq"))}


def in_passes(parameter: Tensor, working: Tensor) -> None:
    """Scaling, torch's fused update, and the copy."""
    tensors, _ = inputs()
    tensors[1].mul_(SCALE)
    step = torch.ones((), device="cuda")
    beta1, beta2 = HOW["betas"]
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [parameter],
        [tensors[1]],
        [tensors[2]],
        [tensors[3]],
        [],
        [step],
        lr=LR,
        beta1=beta1,
        beta2=beta2,
        weight_decay=DECAY,
        eps=HOW["eps"],
        amsgrad=False,
        maximize=False,
    )
    working.copy_(parameter)


def cases() -> list[Case]:
    tensors, shared = inputs()
    p, lrs = tensors[0], torch.tensor([LR], device="cuda")
    working = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda")
    moved = 30.0 * p.numel()
    return [
        Case(
            "update",
            graphed(lambda _: adamw_kernel_(*lists(tensors), lrs, shared, **HOW, workings=[working])),
            check,
            {"parameter": 1e-6, "exp_avg": 1e-6, "exp_avg_sq": 1e-6},
            *floor(0, moved),
            0,
            moved,
            {"torch, three passes": graphed(lambda _: in_passes(p, working))},
        )
    ]
