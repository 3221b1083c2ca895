"""The definition of accumulation in fp32."""

from torch import Tensor


def accumulate_reference_(total: Tensor, grad: Tensor) -> None:
    total.add_(grad)
