"""The definition of the column sum."""

import torch
from torch import Tensor


def column_sum_reference(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
