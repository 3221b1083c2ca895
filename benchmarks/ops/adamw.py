"""One AdamW update of a layer's experts with clipping and the bf16 copy, at LFM-3B's size."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.adamw.kernel import adamw_kernel_
from lfm.kernels.adamw.reference import adamw_reference_

SHAPE = (8, 2304, 3072)
HOW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "scale": 0.5}


@functools.cache
def inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.rand(SHAPE, generator=generator, device="cuda") for _ in range(4)]
    return tensors, torch.tensor([1.5, 3.0], device="cuda")


def check() -> dict[str, float]:
    tensors, corrections = inputs()
    got, want = [t.clone() for t in tensors], [t.double() for t in tensors]
    adamw_kernel_(got[0], got[1], got[2], got[3], corrections, **HOW, working=None)
    adamw_reference_(want[0], want[1], want[2], want[3], corrections.double(), **HOW, working=None)
    return {name: norm_ratio(got[i], want[i]) for i, name in ((0, "parameter"), (2, "exp_avg"), (3, "exp_avg_sq"))}


def in_passes(parameter: Tensor, working: Tensor) -> None:
    """Scaling, torch's fused update, and the copy."""
    tensors, _ = inputs()
    tensors[1].mul_(HOW["scale"])
    step = torch.ones((), device="cuda")
    beta1, beta2 = HOW["betas"]
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [parameter],
        [tensors[1]],
        [tensors[2]],
        [tensors[3]],
        [],
        [step],
        lr=HOW["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=HOW["weight_decay"],
        eps=HOW["eps"],
        amsgrad=False,
        maximize=False,
    )
    working.copy_(parameter)


def cases() -> list[Case]:
    tensors, corrections = inputs()
    p, g, m, v = tensors
    working = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda")
    moved = 30.0 * p.numel()
    return [
        Case(
            "update",
            graphed(lambda _: adamw_kernel_(p, g, m, v, corrections, **HOW, working=working)),
            check,
            {"parameter": 1e-6, "exp_avg": 1e-6, "exp_avg_sq": 1e-6},
            *floor(0, moved),
            0,
            moved,
            {"torch, three passes": graphed(lambda _: in_passes(p, working))},
        )
    ]
