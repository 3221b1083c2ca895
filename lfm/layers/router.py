"""Which experts a token goes to: choice, weights, capacity, balance and z losses."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from lfm.config import Config
from lfm.kernels.router import choose_experts


class LossBalance(Config):
    """Balance by a loss of each row, or of each micro-batch."""

    kind: Literal["loss"] = "loss"
    coeff: float = Field(default=0.01, ge=0)
    scope: Literal["sequence", "batch"] = "sequence"
    """batch: over the micro-batch, which makes the loss depend on the layout."""


@dataclass
class Routing:
    """Where tokens go.  `experts[n, i]` is -1 where capacity dropped the assignment (its weight is then 0)."""

    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    balance_loss: Float[Tensor, " B"]
    """Per row, 1 at perfect balance."""
    z_loss: Float[Tensor, " B"]
    """Per row, mean over its tokens of logsumexp(router logits)^2."""
    load: Int[Tensor, " E"]
    """Assignments each expert received, after dropping."""


def route(
    logits: Float[Tensor, "B T E"], *, top_k: int, capacity_factor: float | None, balance_over: str = "sequence"
) -> Routing:
    """Choose `top_k` experts per token; scores, weights and losses in at least fp32.

    Balance loss: `E * sum_i f_i P_i` with f_i the share of assignments (no gradient) and P_i the mean probability of
    expert i (Fedus et al. 2021, arXiv 2101.03961), per row of the batch.  z-loss: Zoph et al. 2022, arXiv 2202.08906.
    """
    B, T, E = logits.shape
    experts, weights, probability, load, z_loss = choose_experts(logits, top_k)

    share = load.to(logits.dtype) / (T * top_k)  # before dropping
    if balance_over == "batch":
        share, probability = (part.mean(0, keepdim=True).expand(B, E) for part in (share, probability))
    balance_loss = E * (share * probability).sum(-1)

    if capacity_factor is not None:
        # Per row, so that micro-batch and layout do not matter; earlier positions win, so that it stays causal.
        capacity = math.ceil(capacity_factor * top_k * T / E)
        place = F.one_hot(experts, E).sum(2).cumsum(1).gather(2, experts)  # 1 for the first token of that expert
        kept = place <= capacity
        weights = weights * kept
        experts = experts.masked_fill(~kept, -1)
        load = load.clamp(max=capacity)
    return Routing(experts.flatten(0, 1), weights.flatten(0, 1), balance_loss, z_loss, load.sum(0))
