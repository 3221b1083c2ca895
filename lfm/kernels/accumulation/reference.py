"""The definition of accumulation in fp32."""

from torch import Tensor


def accumulate_reference_(total: Tensor, grad: Tensor, factor: Tensor | None, add: bool) -> None:
    if factor is not None:
        grad = grad.to(total.dtype) * factor.to(total.dtype)
    if add:
        total.add_(grad)
    else:
        total.copy_(grad)
