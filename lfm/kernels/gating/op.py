"""`joined_norm`, `gated` and `scaled_sum`: checks, the choice of path, and closed-form gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.gating.reference import gated_reference, joined_norm_reference, scaled_sum_reference
from lfm.kernels.gradient_sum import GradientSum, gradient_sum

_LONGEST_ROW = 4096
"""The kernels hold a row of each half in registers."""


def joined_norm(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x again; `s = exp(log_scale) y`; and the layer norm of `[x; s]` with gain and bias: `[..., D]`, `[..., D]`,
    `[..., 2D]`, of one dtype. log_scale: `[1]`; weight, bias: `[2D]`.

    s is rounded to the dtype before it is normalized; statistics are in at least fp32.  Whoever goes on with the x that
    comes back has its gradients added in the kernel.
    """
    D = x.shape[-1]
    if y.shape != x.shape or weight.shape != (2 * D,) or bias.shape != (2 * D,) or log_scale.numel() != 1:
        shapes = [list(part.shape) for part in (x, y, log_scale, weight, bias)]
        raise ValueError(
            f"x, y, log_scale, weight, bias have shapes {shapes}; they must be [.., D] twice, [1], [2D] twice"
        )
    alike = len({x.dtype, y.dtype, log_scale.dtype, weight.dtype, bias.dtype}) == 1
    if alike and 0 < D <= _LONGEST_ROW and x.numel() and runs_triton(x, backend, _joined_comparison, D):
        return _JoinedNorm.apply(x, y, log_scale, weight, bias, eps)  # pyright: ignore[reportReturnType]
    return x, *joined_norm_reference(x, y, log_scale, weight, bias, eps)


def gated(logits: Tensor, a: Tensor, b: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`g a + (1 - g) b` with `g = sigmoid(logits)`, of one shape and dtype."""
    if a.shape != logits.shape or b.shape != logits.shape:
        raise ValueError(f"logits, a, b have shapes {[list(part.shape) for part in (logits, a, b)]}; they must agree")
    alike = logits.dtype == a.dtype == b.dtype
    if alike and a.numel() and runs_triton(a, backend, _gated_comparison):
        return _Gated.apply(logits, a, b)  # pyright: ignore[reportReturnType]
    return gated_reference(logits, a, b)


def scaled_sum(x: Tensor, y: Tensor, scale: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`x + scale y`, of one shape and dtype; scale: `[1]`."""
    if y.shape != x.shape or scale.numel() != 1:
        raise ValueError(f"x, y, scale have shapes {[list(part.shape) for part in (x, y, scale)]}; scale must be [1]")
    alike = x.dtype == y.dtype == scale.dtype
    if alike and x.numel() and runs_triton(x, backend, _scaled_comparison):
        return _ScaledSum.apply(x, y, scale)  # pyright: ignore[reportReturnType]
    return scaled_sum_reference(x, y, scale)


def _given(found: GradientSum | None, gradient: Tensor, like: Tensor) -> Tensor | None:
    """An fp32 gradient in `like`'s shape and dtype; None where it went to its sum."""
    gradient = gradient.view(like.shape)
    if found is None:
        return gradient.to(like.dtype)
    found.add(gradient)
    return None


class _JoinedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, log_scale: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lfm.kernels.gating.kernel import joined_norm_forward

        ctx.set_materialize_grads(False)
        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums = [gradient_sum(parameter) for parameter in (log_scale, weight, bias)]
        scaled, normalized, statistics = joined_norm_forward(
            x.contiguous(), y.contiguous(), log_scale, weight, bias, eps
        )
        ctx.save_for_backward(x, scaled, log_scale, weight, bias, statistics)
        return x.view_as(x), scaled, normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.gating.kernel import joined_norm_backward

        x, scaled, log_scale, weight, bias, statistics = ctx.saved_tensors
        grad_x, grad_scaled, grad = (None if each is None else each.contiguous() for each in grad_outputs)
        if grad is None:
            grad = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        to_x, to_y, shares = joined_norm_backward(
            grad_x, grad_scaled, grad, x.contiguous(), scaled, log_scale, weight, statistics
        )
        D = x.shape[-1]
        of_weight, of_bias, of_scale = shares.sum(0).split((2 * D, 2 * D, 1))
        parts = zip(ctx.sums, (of_scale, of_weight, of_bias), (log_scale, weight, bias), strict=True)
        return to_x, to_y, *(_given(*part) for part in parts), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
        from lfm.kernels.gating.kernel import gated_forward

        logits, a, b = logits.contiguous(), a.contiguous(), b.contiguous()
        ctx.save_for_backward(logits, a, b)
        return gated_forward(logits, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.gating.kernel import gated_backward

        return gated_backward(grad_outputs[0].contiguous(), *ctx.saved_tensors)


class _ScaledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        from lfm.kernels.gating.kernel import scaled_sum_forward

        ctx.sum, y = gradient_sum(scale), y.contiguous()
        ctx.save_for_backward(y, scale)
        return scaled_sum_forward(x.contiguous(), y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.gating.kernel import scaled_sum_backward

        y, scale = ctx.saved_tensors
        to_y, shares = scaled_sum_backward(grad_outputs[0].contiguous(), y, scale)
        return grad_outputs[0], to_y, _given(ctx.sum, shares.sum(0), scale)


def _joined_comparison(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    shapes = [(40, D), (40, D), (1,), (2 * D,), (2 * D,)]
    leaves = [draw(i, *shape, device=device, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    got = joined_norm(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], eps=1e-5, backend="triton")
    want = wide[0], *joined_norm_reference(wide[0], wide[1], wide[2], wide[3], wide[4], 1e-5)
    yield from zip(("the scaled part", "the norm"), got[1:], want[1:], strict=True)
    grads = [draw(9 + i, *part.shape, device=device, dtype=dtype) for i, part in enumerate(got)]
    right = torch.autograd.grad(want, wide, [grad.float() for grad in grads])
    mine = torch.autograd.grad(got, leaves, grads)
    yield from (("a gradient", *pair) for pair in zip(mine[:2], right[:2], strict=True))
    # Together: that of log_scale is one number, a sum that may come out near zero.
    parameters, wanted = (torch.cat([part.flatten() for part in each[2:]]) for each in (mine, right))
    yield "the gradient of the parameters", parameters, wanted


def _gated_comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield from _compared(gated, gated_reference, [(5000,)] * 3, device, dtype)


def _scaled_comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield from _compared(scaled_sum, scaled_sum_reference, [(5000,), (5000,), (1,)], device, dtype)


def _compared(
    op: Any, reference: Any, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor]]:
    leaves = [draw(i, *shape, device=device, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    got, want = op(*leaves, backend="triton"), reference(*wide)
    yield "the result", got, want
    grad = draw(9, *shapes[0], device=device, dtype=dtype)
    right = torch.autograd.grad(want, wide, grad.float())
    yield from (("a gradient", *pair) for pair in zip(torch.autograd.grad(got, leaves, grad), right, strict=True))
