"""Leaves whose gradients go to fp32 sums, as an engine has them."""

import torch
from torch import Tensor

from lfm.kernels.gradient_sum import GradientSum, Later, gradient_sum


def summed(parameter: Tensor, later: Later | None = None) -> Tensor:
    """A leaf with the values of `parameter`, and a sum that holds no number before its first gradient."""
    leaf = parameter.detach().clone().requires_grad_()
    wide = torch.promote_types(leaf.dtype, torch.float32)
    total = torch.full_like(leaf, torch.nan, dtype=wide, requires_grad=False)
    leaf.gradient_sum = GradientSum(total, later=later)  # pyright: ignore[reportAttributeAccessIssue]
    return leaf


def summed_gradient(leaf: Tensor) -> Tensor:
    """What the operations on `leaf` added up, none of it by autograd."""
    assert leaf.grad is None
    found = gradient_sum(leaf)
    assert found is not None and not found.is_empty
    return found.total
