"""The definition of the in-place cross entropy, in plain PyTorch."""

import torch
from torch import Tensor


def cross_entropy_reference_(
    logits: Tensor,
    labels: Tensor,
    gradient: bool,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    kept = labels >= 0
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
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


def shard_sums_reference(logits: Tensor, labels: Tensor) -> Tensor:
    n, V = logits.shape
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if V == 0:
        return wide.new_tensor([-torch.inf, 0, 0]).expand(n, 3)
    here = (labels >= 0) & (labels < V)
    label_logit = wide.gather(1, labels.masked_fill(~here, 0)[:, None])[:, 0].masked_fill(~here, 0)
    top = wide.amax(-1)
    return torch.stack([top, (wide - top[:, None]).exp_().sum(-1), label_logit], 1)


def shard_gradient_reference_(logits: Tensor, labels: Tensor, log_normalizer: Tensor, factors: Tensor) -> None:
    wide = logits.to(log_normalizer.dtype)
    here = (labels >= 0) & (labels < logits.shape[1])
    softmax = wide.sub_(log_normalizer[:, None]).exp_()
    if logits.shape[1]:
        softmax.scatter_add_(1, labels.masked_fill(~here, 0)[:, None], -here.to(wide.dtype)[:, None])
    softmax.mul_(factors[:, None])
    if softmax is not logits:
        logits.copy_(softmax)


def scaled_reference(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # A factor without dimensions would be rounded to x's dtype first.
    return torch.mul(x, factor.view(1), out=torch.empty_like(x, dtype=dtype))
