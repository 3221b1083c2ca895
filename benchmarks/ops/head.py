"""LFM-3B's loss head: output projection and cross entropy with both gradients, and the cross entropy alone."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, floor, norm_ratio
from lfm.kernels.cross_entropy import cross_entropy_, scaled
from lfm.kernels.cross_entropy.reference import cross_entropy_reference_, scaled_reference
from lfm.layers.loss import linear_cross_entropy

N, V, D = 8192, 128_256, 3072
CHUNK = 4096


@functools.cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 1."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(V, D, generator=generator, device="cuda") * D**-0.5).bfloat16()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator, device="cuda")


def loss_and_grads(function, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    hidden, weight, labels = inputs()
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, labels)
    grads = torch.autograd.grad(loss / N, (hidden, weight))
    return {"loss": loss.detach(), "hidden": grads[0], "weight": grads[1]}


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def check() -> dict[str, float]:
    got, want = loss_and_grads(linear_cross_entropy), loss_and_grads(linear_cross_entropy, torch.float64)
    return {name: norm_ratio(got[name], want[name]) for name in want}


@functools.cache
def chunk_logits() -> Tensor:
    hidden, weight, _ = inputs()
    return hidden[:CHUNK] @ weight.T


def check_chunk() -> dict[str, float]:
    logits, labels = chunk_logits()[:512].clone(), inputs()[2][:512]
    exact = logits.double()
    want = {"losses": cross_entropy_reference_(exact, labels, True), "gradient": exact}
    got = {"losses": cross_entropy_(logits, labels), "gradient": logits}
    return {name: norm_ratio(got[name], want[name]) for name in want}


@functools.cache
def gradient() -> tuple[Tensor, Tensor]:
    """A weight gradient as its products leave it, and a factor."""
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(V, D, generator=generator, device="cuda"), torch.tensor(1 / N, device="cuda")


def check_scaled() -> dict[str, float]:
    x, factor = gradient()
    return {"gradient": norm_ratio(scaled(x, factor, torch.bfloat16), x.double() * factor)}


def cases() -> list[Case]:
    flops, moved = 6.0 * N * V * D, 2.0 * (3 * N * D + 2 * V * D)
    chunk_bytes = 4.0 * CHUNK * V
    return [
        Case(
            "head, forward + backward",
            lambda: loss_and_grads(linear_cross_entropy),
            check,
            {"loss": 1e-4, "hidden": 5e-3, "weight": 5e-3},
            *floor(flops, moved),
            flops,
            moved,
            {"naive": lambda: loss_and_grads(naive)},
        ),
        Case(
            "cross entropy of a chunk",
            lambda: cross_entropy_(chunk_logits(), inputs()[2][:CHUNK]),
            check_chunk,
            {"losses": 1e-5, "gradient": 3e-3},
            *floor(0, chunk_bytes),
            0,
            chunk_bytes,
            {"plain PyTorch": lambda: cross_entropy_reference_(chunk_logits(), inputs()[2][:CHUNK], True)},
        ),
        Case(
            "scaling of the weight's gradient",
            lambda: scaled(*gradient(), torch.bfloat16),
            check_scaled,
            {"gradient": 3e-3},
            *floor(0, 6.0 * V * D),
            0,
            6.0 * V * D,
            {"plain PyTorch": lambda: scaled_reference(*gradient(), torch.bfloat16)},
        ),
    ]
