"""`linear`: a matrix product whose weight adds up its own gradient, inside the product."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.gradient_sum import GradientSum, gradient_sum


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times the transpose of `weight [N, K]`, plus `bias [N]` -> `[..., N]`, all of one dtype.

    Without a `gradient_sum` of the weight this is `torch.nn.functional.linear`.  With one, backward makes the gradient
    of x first and then puts those of weight and bias into their sums, rounded to no narrower dtype on the way.
    """
    if gradient_sum(weight) is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def add_product_(total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """`total [M, N] (+)= left^T right`, of `left [n, M]` and `right [n, N]`, in total's dtype; without `add` total is
    not read."""
    beta = 1 if add else 0
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.T, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), beta=beta)


def sum_left_to_autograd(found: GradientSum | None, summands: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The sum of `summands [n, ...]` over n in `dtype`, from sums in at least fp32; None where it went to `found`."""
    if found is None:
        return summands.sum(0, dtype=torch.promote_types(summands.dtype, torch.float32)).to(dtype)
    found.add(summands.sum(0, dtype=found.total.dtype))
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums = gradient_sum(weight), None if bias is None else gradient_sum(bias)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.sums
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad_outputs[0].reshape(-1, len(weight))
        # First, because whoever made x waits for it.
        grad_x = (grad @ weight).view(x.shape) if needs_x else None
        if needs_weight:
            rows = x.reshape(-1, x.shape[-1])
            of_weight.put(lambda total, add: add_product_(total, grad, rows, add))
        return grad_x, None, sum_left_to_autograd(of_bias, grad, grad.dtype) if needs_bias else None
