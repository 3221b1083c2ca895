"""`add_rms_norm`: checks, the choice of path, and the closed-form gradient."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.gradient_sum import gradient_sum
from lfm.kernels.linear import sum_left_to_autograd
from lfm.kernels.rms_norm.reference import add_rms_norm_reference

_LONGEST_ROW = 16_384
"""The kernels hold a row in registers."""


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, *, eps: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """`s = x + y` (x where y is None) and `s * rsqrt(mean(s^2) + eps) * weight`, `[..., D]` of one dtype.

    s is rounded to the dtype before it is normalized; statistics are in at least fp32.
    """
    if weight.shape != x.shape[-1:] or (y is not None and y.shape != x.shape):
        shapes = f"x has shape {list(x.shape)}, y {None if y is None else list(y.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{shapes}; y must be like x and weight like its last dimension")
    held = x.dtype == weight.dtype and 0 < x.shape[-1] <= _LONGEST_ROW
    if held and runs_triton(x, backend, _comparison, x.shape[-1]):
        total, normalized = cast(tuple[Tensor, Tensor], _AddRMSNorm.apply(x, y, weight, eps))
        return x if y is None else total, normalized
    return add_rms_norm_reference(x, y, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        from lfm.kernels.rms_norm.kernel import add_rms_norm_forward

        ctx.set_materialize_grads(False)
        x = x.contiguous()
        total, normalized, scale = add_rms_norm_forward(x, None if y is None else y.contiguous(), weight, eps)
        ctx.save_for_backward(x if y is None else total, weight, scale)
        ctx.added, ctx.sum = y is not None, gradient_sum(weight)
        return (None if y is None else total), normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.rms_norm.kernel import add_rms_norm_backward

        grad_total, grad_normalized = (None if grad is None else grad.contiguous() for grad in grad_outputs)
        if grad_normalized is None:
            return grad_total, grad_total if ctx.added else None, None, None
        grad, shares = add_rms_norm_backward(grad_total, grad_normalized, *ctx.saved_tensors)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = sum_left_to_autograd(ctx.sum, shares, grad_normalized.dtype)
        return grad, grad if ctx.added else None, grad_weight, None


def _comparison(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, y, grad_total, grad = (draw(seed, 40, D, device=device, dtype=dtype) for seed in range(4))
    leaves = [part.requires_grad_() for part in (x, y, draw(4, D, device=device, dtype=dtype))]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    got = add_rms_norm(leaves[0], leaves[1], leaves[2], eps=1e-6, backend="triton")
    want = add_rms_norm_reference(wide[0], wide[1], wide[2], 1e-6)
    yield from zip(("the sum", "the normalized sum"), got, want, strict=True)
    right = torch.autograd.grad(want, wide, [grad_total.float(), grad.float()])
    pairs = zip(torch.autograd.grad(got, leaves, [grad_total, grad]), right, strict=True)
    yield from (("a gradient", *pair) for pair in pairs)
