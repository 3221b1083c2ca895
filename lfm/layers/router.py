"""Which experts a token goes to: choice, weights, capacity, balance and z losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from lfm.config import Config, default_kind
from lfm.kernels.router import choose_experts, row_means
from lfm.layers.stored import Stored

BalanceScope = Literal["sequence", "batch", "step"]


class LossBalance(Config):
    """Balance by a loss alone."""

    kind: Literal["loss"] = "loss"
    """A loss that is small where experts have equal shares of the tokens."""
    coeff: float = Field(default=0.01, ge=0)
    scope: BalanceScope = "sequence"
    """Whose shares: of each row; of the micro-batch, which makes the loss depend on the layout; or step, of the whole
    optimizer step before."""


class BiasBalance(Config):
    """Balance by a bias on the choice, which moves once an optimizer step; a loss beside it where coeff > 0."""

    kind: Literal["bias"] = "bias"
    """Experts are chosen by logit + bias, and weighed without it; the bias follows the load of the whole batch."""
    update_rate: float = 0.02
    """How far a step moves the bias of an expert that has more tokens than the mean down, and of one that has fewer
    up; between 0 and 1."""
    mean_decay: float | None = Field(default=0.5, ge=0, lt=1)
    """The bias also takes the mean logit of each expert off, averaged over steps with this decay; null: it does not."""
    coeff: float = Field(default=0.01, ge=0)
    """Of a balance loss beside the bias; 0: none."""
    scope: BalanceScope = "sequence"
    """Of that loss, as of kind loss."""

    @field_validator("update_rate")
    @classmethod
    def _check_rate(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(
                f"update_rate={value} is not between 0 and 1: it is added to a bias on logits at every step; try 0.02"
            )
        return value


BalanceConfig = Annotated[
    Annotated[LossBalance | BiasBalance, Field(discriminator="kind")],
    default_kind("bias"),
]

MEAN_GRID = 2.0**-8
"""What `Balance.mean` is rounded to, so that every layout chooses by the same bias."""
LOGIT_GRID = 2.0**-10
"""Fixed point of a row's mean logits, whose sums over rows are then exact in any order."""
_LARGEST_LOGIT = 2.0**12
"""Beyond it a mean logit counts as this: sums over 2^31 tokens of a step are then exact in fp64 too."""
_SAMPLED_TOKENS = 512
"""Of a row, for the cosine of the router's inputs."""


class Balance(nn.Module):
    """What a router's balance keeps from one optimizer step to the next; fp32 `[E]` each, and only what its kind needs.

    `drift - mean` is the bias: drift moves by the sign of mean load - load, mean follows the mean logits.  `shares` are
    of the step before.  `lfm.training.router_balance` moves them, between steps and alike on all processes.
    """

    moving_buffers: ClassVar[tuple[str, ...]] = ("drift", "mean", "shares")
    """Buffers that are neither trained nor frozen."""
    drift: Tensor
    mean: Tensor
    shares: Tensor

    def __init__(self, num_experts: int, config: Any) -> None:
        super().__init__()
        is_bias = isinstance(config, BiasBalance)
        kept = {"drift": is_bias, "mean": is_bias and config.mean_decay is not None, "shares": config.scope == "step"}
        for name in self.moving_buffers:
            if kept[name]:
                self.register_buffer(name, torch.empty(num_experts, dtype=torch.float32))
        self.start()

    def stored(self) -> dict[str, Stored]:
        return {name: Stored(name) for name, _ in self.named_buffers()}

    @torch.no_grad()
    def start(self) -> None:
        """As before the first step: no bias, equal shares."""
        for name, buffer in self.named_buffers():
            buffer.fill_(1 / len(buffer) if name == "shares" else 0.0)

    @property
    def has_bias(self) -> bool:
        return hasattr(self, "drift")

    @property
    def follows_logits(self) -> bool:
        return hasattr(self, "mean")

    @property
    def has_shares(self) -> bool:
        return hasattr(self, "shares")

    def bias(self) -> Float[Tensor, " E"] | None:
        """What the choice adds to the logits; None: nothing."""
        if not self.has_bias:
            return None
        return self.drift - self.mean if self.follows_logits else self.drift


@dataclass
class Routing:
    """Where tokens go.  `experts[n, i]` is -1 where capacity dropped the assignment (its weight is then 0)."""

    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    load: Int[Tensor, " E"]
    """Assignments each expert received, after dropping."""
    counts: Int[Tensor, "B E"]
    """Tokens of each row that chose each expert, before dropping."""
    means: Float[Tensor, "B means"]
    """Over the tokens of each row: `lfm.kernels.router.row_means`."""
    balance_over: BalanceScope
    shares: Float[Tensor, " E"] | None
    """Of the step before, where the balance loss is over the step."""
    sample: Float[Tensor, "B s D"] | None = None
    """Some of the router's inputs, where a backward pass may follow; no gradients."""


def route(
    logits: Float[Tensor, "B T E"],
    *,
    top_k: int,
    capacity_factor: float | None,
    balance_over: BalanceScope = "sequence",
    bias: Float[Tensor, " E"] | None = None,
    shares: Float[Tensor, " E"] | None = None,
) -> Routing:
    """Choose `top_k` experts per token, by logits + `bias`; scores and weights in at least fp32.

    Bias: Wang et al. 2024, arXiv 2408.15664.
    """
    _, T, E = logits.shape
    experts, weights, counts, means = choose_experts(logits, top_k, bias)
    load = counts
    if capacity_factor is not None:
        # Per row, so that micro-batch and layout do not matter; earlier positions win, so that it stays causal.
        capacity = math.ceil(capacity_factor * top_k * T / E)
        place = F.one_hot(experts, E).sum(2).cumsum(1).gather(2, experts)  # 1 for the first token of that expert
        kept = place <= capacity
        weights = weights * kept
        experts = experts.masked_fill(~kept, -1)
        load = counts.clamp(max=capacity)
    assert (shares is not None) == (balance_over == "step")
    return Routing(experts.flatten(0, 1), weights.flatten(0, 1), load.sum(0), counts, means, balance_over, shares)


class RouterLosses(NamedTuple):
    """Of each layer and row."""

    balance: Float[Tensor, "L B"]
    """1 at perfect balance."""
    z: Float[Tensor, "L B"]
    """Mean over the row's tokens of logsumexp(router logits)^2."""


def router_losses(layers: Sequence[Routing]) -> RouterLosses:
    """Of all layers at once, in at least fp32.

    Balance loss: `E * sum_i f_i P_i` with f_i the share of assignments before dropping (no gradient) and P_i the mean
    probability of expert i (Fedus et al. 2021, arXiv 2101.03961), per row of the batch.  Over the "step", f are the
    `shares` of the whole batch of the step before: those of this one are not known to a micro-batch.  z-loss: Zoph et
    al. 2022, arXiv 2202.08906.
    """
    first = layers[0]
    means = row_means(torch.stack([each.means for each in layers]))
    probability, (B, E) = means.probability, first.counts.shape
    if first.balance_over == "step":
        share = torch.stack([each.shares for each in layers if each.shares is not None]).to(probability.dtype)[:, None]
    else:
        assignments = first.experts.numel() // B  # of a row
        share = torch.stack([each.counts for each in layers]).to(probability.dtype) / assignments
    if first.balance_over == "batch":
        share, probability = (part.mean(1, keepdim=True).expand(-1, B, -1) for part in (share, probability))
    return RouterLosses(E * (share * probability).sum(-1), means.z)


@torch.no_grad()
def sampled(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B s D"]:
    """Evenly spaced tokens of each row, in memory of their own where they are not all."""
    return x.detach()[:, :: -(-x.shape[1] // _SAMPLED_TOKENS)].contiguous()


class Observed(NamedTuple):
    """What routers are watched by while they train, in one forward pass, by layer; no gradients."""

    entropy: Float[Tensor, " L"]
    """Mean over tokens of that of softmax(logits), in nats."""
    input_cosine: Float[Tensor, " L"]
    """Mean over rows of the mean cosine between two of a router's sampled inputs."""
    mean_logit: Float[Tensor, "L B E"]
    """Over the tokens of each row."""


@torch.no_grad()
def observe(layers: Sequence[Routing]) -> Observed:
    """Of all layers at once; each has a sample of its inputs."""
    means = row_means(torch.stack([each.means for each in layers]))
    x = torch.stack([each.sample for each in layers if each.sample is not None]).to(means.entropy.dtype)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()
    n = x.shape[2]
    # The square of the sum of the directions is n and every cosine twice.
    square = (scale.mT @ x).square().sum((2, 3)).mean(1)
    cosine = (square - n) / (n * (n - 1)) if n > 1 else torch.ones_like(square)
    return Observed(means.entropy.mean(1), cosine, means.logit)


@torch.no_grad()
def fixed_point(mean: Float[Tensor, "... B E"], num_tokens: int) -> Int[Tensor, "... E"]:
    """The sums of logits over all rows of so many tokens, from each row's mean, in units of LOGIT_GRID."""
    limit = _LARGEST_LOGIT / LOGIT_GRID
    return (mean / LOGIT_GRID).clamp(-limit, limit).round().long().sum(-2) * num_tokens
