"""A linear layer whose bias has its gradient at the speed of memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfm.kernels.column_sum import column_sum


class Linear(nn.Linear):
    """`nn.Linear`; in half precision on a GPU the gradient of its bias is a `column_sum`."""

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        half = input.is_cuda and input.dtype in (torch.float16, torch.bfloat16) and input.dtype == self.weight.dtype
        if bias is None or not (half and bias.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        return _BiasedProduct.apply(input, self.weight, bias)


class _BiasedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None if weight is None else grad @ weight
        grad_weight = None if x is None else rows.T @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, column_sum(rows) if ctx.needs_input_grad[2] else None
