"""The definition of the residual sum and its normalization.  Zhang & Sennrich 2019, arXiv 1910.07467."""

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm_reference(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x if y is None else x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)
