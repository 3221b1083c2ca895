"""The residual sum with its norm at LFM-3B's width, forward and backward."""

import functools

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.rms_norm.kernel import add_rms_norm_backward, add_rms_norm_forward
from lfm.kernels.rms_norm.reference import add_rms_norm_reference

N, D, EPS = 8192, 3072, 1e-5


@functools.cache
def inputs() -> tuple[Tensor, ...]:
    """x, y, weight, and the gradients of the sum and of the normalized sum."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((N, D), (N, D), (D,), (N, D), (N, D))
    return tuple(torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)


def forward() -> tuple[Tensor, Tensor, Tensor]:
    return add_rms_norm_forward(*inputs()[:3], EPS)


@functools.cache
def saved() -> tuple[Tensor, Tensor]:
    total, _, scale = forward()
    return total, scale


def backward() -> tuple[Tensor, Tensor]:
    total, scale = saved()
    grad, shares = add_rms_norm_backward(*inputs()[3:], total, inputs()[2], scale)
    return grad, shares.sum(0)


def plain(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Sum, normalized sum, and the gradients of x and weight."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs()[:3]]
    outputs = add_rms_norm_reference(leaves[0], leaves[1], leaves[2], EPS)
    grads = torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in inputs()[3:]])
    return *outputs, grads[0], grads[2]


def check_forward() -> dict[str, float]:
    want = plain(torch.float64)
    return {name: norm_ratio(*pair) for name, pair in zip(("s", "n"), zip(forward(), want, strict=False), strict=False)}


def check_backward() -> dict[str, float]:
    want = plain(torch.float64)[2:]
    return {name: norm_ratio(*pair) for name, pair in zip(("x", "w"), zip(backward(), want, strict=True), strict=True)}


def cases() -> list[Case]:
    moved = 8.0 * N * D
    forward_peer = {"plain PyTorch": graphed(lambda _: add_rms_norm_reference(*inputs()[:3], EPS))}
    backward_peer = {"plain PyTorch, forward + backward": graphed(lambda _: plain())}
    about = (*floor(0, moved), 0.0, moved)
    return [
        Case(
            "sum and norm, forward",
            graphed(lambda _: forward()),
            check_forward,
            {"s": 3e-3, "n": 5e-3},
            *about,
            forward_peer,
        ),
        Case(
            "sum and norm, backward",
            graphed(lambda _: backward()),
            check_backward,
            {"x": 5e-3, "w": 5e-3},
            *about,
            backward_peer,
        ),
    ]
