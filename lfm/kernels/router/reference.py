"""The definitions of a router's logits and of its choice, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


def choose_experts_reference(
    logits: Tensor, top_k: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, load and means as in `op.Choice`."""
    probabilities = logits.softmax(-1)
    scores = logits if bias is None else logits + bias
    # Logits, of which no exponential can make two equal; stable, because which of equal ones `topk` takes is open.
    experts = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    # What a bias lets in may be so improbable that all its probabilities round to 0: a softmax of the chosen alone.
    top = probabilities.gather(-1, experts) if bias is None else logits.gather(-1, experts).softmax(-1)
    load = F.one_hot(experts, logits.shape[-1]).sum((1, 2))
    z = logits.logsumexp(-1).square().mean(-1, keepdim=True)
    with torch.no_grad():
        entropy = torch.special.entr(probabilities).sum(-1).mean(-1, keepdim=True)
        mean_logit = logits.mean(1)
    means = torch.cat([probabilities.mean(1), mean_logit, z, entropy], -1)
    return experts, top / top.sum(-1, keepdim=True), load, means
