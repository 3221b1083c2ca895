"""The definition of the in-place cross entropy, in plain PyTorch."""

import torch
from torch import Tensor


def cross_entropy_reference_(
    logits: Tensor, labels: Tensor, gradient: bool, token_weights: Tensor | None = None
) -> Tensor:
    kept = labels >= 0
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = labels.masked_fill(~kept, 0)[:, None]
    log_normalizer = wide.logsumexp(-1)
    losses = (log_normalizer - wide.gather(1, label)[:, 0]) * kept
    if gradient:
        softmax = wide.sub_(log_normalizer[:, None]).exp_()
        softmax.scatter_add_(1, label, -kept.to(wide.dtype)[:, None]).mul_(kept[:, None])
        if token_weights is not None:
            softmax.mul_(token_weights[:, None])
        if softmax is not logits:
            logits.copy_(softmax)
    return losses if token_weights is None else losses * token_weights


def scaled_reference(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # A factor without dimensions would be rounded to x's dtype first.
    return torch.mul(x, factor.view(1), out=torch.empty_like(x, dtype=dtype))
