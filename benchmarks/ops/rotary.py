"""Rotary embedding of LFM-3B's heads, from the fused projection to attention and back."""

import functools

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.rotary.kernel import rotated_heads_backward, rotated_heads_forward
from lfm.kernels.rotary.reference import rotated_heads_reference
from lfm.layers.rotary import rotary_tables

T, H, G, K = 8192, 24, 8, 128


@functools.cache
def inputs() -> tuple[Tensor, list[Tensor]]:
    """The projection, and gradients of queries, keys and values."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    return normal(1, T, (H + 2 * G) * K), [normal(1, T, heads, K).transpose(1, 2) for heads in (H, G, G)]


@functools.cache
def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.arange(T, device="cuda")[None], head_size=K, base=1e4, dtype=dtype)


def forward() -> tuple[Tensor, ...]:
    return rotated_heads_forward(inputs()[0], *tables(torch.float32), K, G)


def backward() -> Tensor:
    return rotated_heads_backward(*inputs()[1], *tables(torch.float32), K, G)


def plain_grad(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    table = tables(torch.float64 if dtype == torch.float64 else torch.float32)
    qkv = inputs()[0].to(dtype).requires_grad_()
    outputs = rotated_heads_reference(qkv, *table, K, G)
    return torch.autograd.grad(outputs, qkv, [grad.to(dtype) for grad in inputs()[1]])[0]


def check_forward() -> dict[str, float]:
    want = rotated_heads_reference(inputs()[0].double(), *tables(torch.float64), K, G)
    return {name: norm_ratio(*pair) for name, pair in zip("qk", zip(forward(), want, strict=True), strict=False)}


def check_backward() -> dict[str, float]:
    return {"qkv": norm_ratio(backward(), plain_grad(torch.float64))}


def cases() -> list[Case]:
    table_bytes = 4.0 * T * K
    read_and_written = 4.0 * T * (H + G) * K + table_bytes
    returned = 4.0 * T * (H + 2 * G) * K + table_bytes

    def plain() -> tuple[Tensor, ...]:
        return rotated_heads_reference(inputs()[0], *tables(torch.float32), K, G)

    return [
        Case(
            "rotary, forward",
            graphed(lambda _: forward()),
            check_forward,
            {"q": 3e-3, "k": 3e-3},
            *floor(0, read_and_written),
            0,
            read_and_written,
            {"plain PyTorch": graphed(lambda _: plain())},
        ),
        Case(
            "rotary, backward",
            graphed(lambda _: backward()),
            check_backward,
            {"qkv": 3e-3},
            *floor(0, returned),
            0,
            returned,
            {"plain PyTorch, forward + backward": graphed(lambda _: plain_grad())},
        ),
    ]
