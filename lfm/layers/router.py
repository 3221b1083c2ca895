"""Which experts a token goes to: choice, weights, capacity, balance and z losses."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from lfm.config import Config, default_kind
from lfm.kernels.router import choose_experts
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
class Observed:
    """What a router is watched by while it trains, in one forward pass; no gradients."""

    entropy: Float[Tensor, ""]
    """Mean over tokens of that of softmax(logits), in nats."""
    input_cosine: Float[Tensor, ""]
    """Mean over rows of the mean cosine between two of its inputs, from evenly spaced tokens of the row."""
    mean_logit: Float[Tensor, "B E"] | None
    """Over the tokens of each row, where the balance follows them."""
    num_tokens: int
    """Of a row."""


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
    chosen: Int[Tensor, " E"]
    """Tokens that chose each expert, before dropping."""
    observed: Observed | None = None
    """Where a backward pass may follow."""


def route(
    logits: Float[Tensor, "B T E"],
    *,
    top_k: int,
    capacity_factor: float | None,
    balance_over: BalanceScope = "sequence",
    bias: Float[Tensor, " E"] | None = None,
    shares: Float[Tensor, " E"] | None = None,
) -> Routing:
    """Choose `top_k` experts per token, by logits + `bias`; scores, weights and losses in at least fp32.

    Balance loss: `E * sum_i f_i P_i` with f_i the share of assignments (no gradient) and P_i the mean probability of
    expert i (Fedus et al. 2021, arXiv 2101.03961), per row of the batch.  Over the "step", f are its `shares`, of the
    whole batch of the step before: those of this one are not known to a micro-batch.  Bias: Wang et al. 2024, arXiv
    2408.15664.  z-loss: Zoph et al. 2022, arXiv 2202.08906.
    """
    B, T, E = logits.shape
    experts, weights, probability, load, z_loss = choose_experts(logits, top_k, bias)

    chosen = load.sum(0)
    share = load.to(logits.dtype) / (T * top_k)  # before dropping
    if balance_over == "step":
        assert shares is not None
        share = shares.to(logits.dtype)
    elif balance_over == "batch":
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
    return Routing(experts.flatten(0, 1), weights.flatten(0, 1), balance_loss, z_loss, load.sum(0), chosen)


@torch.no_grad()
def observe(x: Float[Tensor, "B T D"], logits: Float[Tensor, "B whole_T E"], *, mean_logit: bool) -> Observed:
    """`x`: the router's inputs, or this process's part of the rows; `mean_logit`: whether it is asked for."""
    step = -(-x.shape[1] // _SAMPLED_TOKENS)
    sample = F.normalize(x[:, ::step].to(logits.dtype), dim=-1)
    n = sample.shape[1]
    # |sum|^2 is n and every cosine twice.
    cosine = (sample.sum(1).square().sum(-1).mean() - n) / (n * (n - 1)) if n > 1 else logits.new_ones(())
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    return Observed(entropy, cosine, logits.mean(1) if mean_logit else None, logits.shape[1])


@torch.no_grad()
def fixed_point(mean: Float[Tensor, "... B E"], num_tokens: int) -> Int[Tensor, "... E"]:
    """The sums of logits over all rows of so many tokens, from each row's mean, in units of LOGIT_GRID."""
    limit = _LARGEST_LOGIT / LOGIT_GRID
    return (mean / LOGIT_GRID).clamp(-limit, limit).round().long().sum(-2) * num_tokens
