"""Sampling from any model with functional state: prefill each prompt, then decode all of them one token at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Config, Count, CountOrZero
from lfm.errors import NonFiniteError, UserError
from lfm.models.language_model import LanguageModel


class SamplingConfig(Config):
    max_new_tokens: Count = 100
    greedy: bool = False
    """Always the most likely token, of equal ones the first; the keys below are then unused."""
    temperature: float = 1.0
    """At least 0.001; for the most likely token use greedy."""
    top_k: CountOrZero = 50
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = Field(default=0.95, ge=0, le=1)
    """Sample among the fewest tokens that hold this much probability, which is above 0."""
    seed: int = Field(default=0, ge=0, lt=2**40)

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if not self.greedy and self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} is below 0.001; for the most likely token use greedy")
        if not self.greedy and self.top_p == 0:
            raise ValueError(f"top_p={self.top_p} keeps no token; for the most likely token use greedy")
        return self


PREFILL_TOKENS = 2048
"""A long prompt is read this many tokens at a time, so that its memory does not grow with it."""


@torch.no_grad()
def prefill(model: LanguageModel, ids: Sequence[int], state: Any = None) -> tuple[Tensor, Any]:
    """Final hidden state `[1, D]` of the last of `ids`, read after the prefix of `state`, and the state after it."""
    assert ids
    device, hidden = model.embedding.weight.device, torch.empty(0)
    for piece in torch.tensor([list(ids)], device=device).split(PREFILL_TOKENS, dim=1):
        hidden, state = model.advance(piece, state)
    return hidden[:, -1], state


@torch.no_grad()
def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, end_of_document: int | None
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next id of every prompt; None for one that has ended.

    A prompt's continuation depends on (prompt, seed, its index) alone, not on the other prompts of the batch.
    Raises UserError for an empty prompt, or one that leaves no room in the context.
    """
    limit = model.config.context_limit
    check_prompts(prompts, limit)
    device = model.embedding.weight.device
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in range(len(prompts))]
    read = [prefill(model, prompt) for prompt in prompts]
    hidden, states = torch.cat([hidden for hidden, _ in read]), [state for _, state in read]
    state = type(states[0]).stack(states)
    lengths, alive = [len(prompt) for prompt in prompts], [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        logits = model.logits(hidden).float().cpu()
        chosen = [choose(logits[i], sampling, generators[i]) if alive[i] else None for i in range(len(prompts))]
        for i, token in enumerate(chosen):
            lengths[i] += alive[i]
            if token == end_of_document or (limit is not None and lengths[i] >= limit):
                alive[i] = False
        yield chosen
        if not any(alive):
            return
        # Ended rows decode a dummy token, so that the batch keeps its shape; nobody reads it.
        step = torch.tensor([[token if token is not None else 0] for token in chosen], device=device)
        out, state = model.advance(step, state)
        hidden = out[:, -1]


def check_prompts(prompts: Sequence[Sequence[int]], context_limit: int | None) -> None:
    """Raise UserError for a prompt that is empty or leaves no room in a context of so many tokens (None: any)."""
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt is empty; give it at least one token")
        if context_limit is not None and len(prompt) >= context_limit:
            raise UserError(
                f"a prompt has {len(prompt)} tokens and the context is {context_limit}; "
                f"shorten it to {context_limit - 1} or fewer"
            )


def choose(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """One id from fp32 `logits [V]`: temperature, then top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751).

    Raises NonFiniteError when the logits are no numbers to choose by.
    """
    if not logits.max().isfinite():  # NaN wherever one is
        raise NonFiniteError(
            "the model's logits are not finite: its weights or its state are broken; use another checkpoint"
        )
    if sampling.greedy:
        return int(logits.argmax())
    probabilities, ids = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities, ids = probabilities[: sampling.top_k], ids[: sampling.top_k]
    # A token stays when the ones before it hold less than top_p of what top-k left: the first always does.
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities * (before < sampling.top_p * probabilities.sum())
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
