"""Linears of which each tensor-parallel process holds a part, in the order of `Parts`: rows, then positions.

Tokens are gathered and handed out as flat rows `[B * whole T, D]`, of which a process has its share, one after the
other: what is gathered is then in the plain model's order, without a transposition.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.gradient_sum import GradientSum, gradient_sum
from lfm.kernels.linear import add_product_, sum_left_to_autograd


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """`[B, T, in]`, `[out / tensor_size, in]` -> `[B, whole T, out / tensor_size]`.

    The share of x is kept, not what was gathered.  Backward gathers it again while the gradient of x is computed, and
    sums that over the processes while the gradient of the weight is: Korthikanti et al. 2022 (arXiv 2205.05198).
    """
    return _Column.apply(x, weight, bias, group)


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[B, whole T, in / tensor_size]`, `[out, in / tensor_size]` -> `[B, T, out]`, summed over the processes."""
    return _Row.apply(x, weight, group)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums, ctx.group = (gradient_sum(weight), None if bias is None else gradient_sum(bias)), group
        ctx.save_for_backward(x, weight)
        whole, _ = _gathered(x, group)
        return F.linear(whole, weight, bias).view(len(x), -1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.sums
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad_outputs[0].reshape(-1, len(weight))
        # Under way while the next product runs, and waited for where they are read.
        whole, gathering = _gathered(x, ctx.group, async_op=True) if needs_weight else (None, None)
        grad_x, summing = _summed(grad @ weight, ctx.group, async_op=True) if needs_x else (None, None)
        grad_weight = grad_bias = None
        if whole is not None and gathering is not None:
            gathering.wait()
            grad_weight = _product_left_to_autograd(of_weight, grad, whole)
        if needs_bias:
            grad_bias = sum_left_to_autograd(of_bias, grad, grad.dtype)
        if grad_x is not None and summing is not None:
            summing.wait()
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_weight, grad_bias, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.sum, ctx.group = gradient_sum(weight), group
        ctx.save_for_backward(x, weight)
        y, _ = _summed(F.linear(x.reshape(-1, x.shape[-1]), weight), group)
        return y.view(len(x), -1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad, _ = _gathered(grad_outputs[0], ctx.group)
        # First, because whoever made x waits for it.
        grad_x = (grad @ weight).view(x.shape) if needs_x else None
        rows = x.reshape(-1, x.shape[-1])
        return grad_x, _product_left_to_autograd(ctx.sum, grad, rows) if needs_weight else None, None


def _product_left_to_autograd(found: GradientSum | None, grad: Tensor, rows: Tensor) -> Tensor | None:
    """The gradient of a weight; None where it went to its sum."""
    if found is None:
        return grad.T @ rows
    found.put(lambda total, add: add_product_(total, grad, rows, add))
    return None


def _gathered(x: Tensor, group: dist.ProcessGroup, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """`[B, T, D]` -> `[B * whole T, D]`, with async_op there once the work was waited for."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    whole = rows.new_empty(len(rows) * group.size(), rows.shape[1])
    return whole, dist.all_gather_into_tensor(whole, rows, group=group, async_op=async_op)


def _summed(summands: Tensor, group: dist.ProcessGroup, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """Each process's `[B * whole T, D]` -> this process's rows of their sum, `[B * T, D]`, as above."""
    own = summands.new_empty(len(summands) // group.size(), summands.shape[1])
    return own, dist.reduce_scatter_tensor(own, summands, group=group, async_op=async_op)
