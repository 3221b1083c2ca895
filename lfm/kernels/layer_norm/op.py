"""`layer_norm`: checks, the choice of path, and the closed-form gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.gradient_sum import gradient_sum
from lfm.kernels.layer_norm.reference import layer_norm_reference
from lfm.kernels.linear import sum_left_to_autograd

_LONGEST_ROW = 8192
"""The kernels hold a row in registers."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, backend: Backend = "auto") -> Tensor:
    """`(x - mean) * rsqrt(variance + eps) * weight + bias` over the last dimension, `[..., D]`, of one dtype; weight
    and bias `[D]`; statistics are in at least fp32."""
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        shapes = f"x has shape {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"{shapes}; weight and bias must be like x's last dimension")
    alike = x.dtype == weight.dtype == bias.dtype
    if alike and x.numel() and x.shape[-1] <= _LONGEST_ROW and runs_triton(x, backend, _comparison, x.shape[-1]):
        return _LayerNorm.apply(x, weight, bias, eps)  # pyright: ignore[reportReturnType]
    return layer_norm_reference(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from lfm.kernels.layer_norm.kernel import layer_norm_forward

        x = x.contiguous()
        normalized, means, scales = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, means, scales)
        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums = gradient_sum(weight), gradient_sum(bias)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.layer_norm.kernel import layer_norm_backward

        given = grad_outputs[0].contiguous()
        grad, *shares = layer_norm_backward(given, *ctx.saved_tensors)
        needed = zip(ctx.needs_input_grad[1:3], ctx.sums, shares, strict=True)
        own = [sum_left_to_autograd(found, each, given.dtype) if needs else None for needs, found, each in needed]
        return grad, *own, None


def _comparison(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, grad = (draw(seed, 70, D, device=device, dtype=dtype) for seed in range(2))
    leaves = [x + 1, *(draw(seed, D, device=device, dtype=dtype) for seed in (2, 3))]
    leaves = [part.requires_grad_() for part in leaves]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    got = layer_norm(leaves[0], leaves[1], leaves[2], eps=1e-5, backend="triton")
    want = layer_norm_reference(wide[0], wide[1], wide[2], 1e-5)
    yield "the normalized rows", got, want
    right = torch.autograd.grad(want, wide, grad.float())
    yield from (("a gradient", *pair) for pair in zip(torch.autograd.grad(got, leaves, grad), right, strict=True))
