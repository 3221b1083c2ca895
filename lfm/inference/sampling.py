"""Sampling from any model with functional state: prefill each prompt, then decode all of them one token at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lfm.config import Config, Count, CountOrZero
from lfm.errors import NonFiniteError, UserError
from lfm.layers.documents import Documents
from lfm.models.decoder import Decoder
from lfm.models.language_model import LanguageModel


class SamplingConfig(Config):
    max_new_tokens: Count = 100
    greedy: bool = False
    """Always the most likely token, of equal ones the first; temperature, top_k, top_p, min_p and seed are then
    unused."""
    temperature: float = 1.0
    """At least 0.001; for the most likely token use greedy."""
    top_k: CountOrZero = 50
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = Field(default=0.95, ge=0, le=1)
    """Sample among the fewest tokens that hold this much probability, which is above 0."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among tokens of at least this share of the most likely one's probability; 0: all."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Of tokens that prompt or reply has: logits above 0 are divided by it, those below multiplied; 1: none."""
    stop: tuple[str, ...] = ()
    """Text that ends the continuation, which is given without it; may be given several times."""
    seed: int = Field(default=0, ge=0, lt=2**40)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop text is empty and would end every text before it begins; leave it out")
        return value

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if not self.greedy and self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} is below 0.001; for the most likely token use greedy")
        if not self.greedy and self.top_p == 0:
            raise ValueError(f"top_p={self.top_p} keeps no token; for the most likely token use greedy")
        return self

    def of_prompt(self, number: int) -> "SamplingConfig":
        """What prompt `number` of several is continued with: a seed of its own, so that equal prompts differ."""
        return self.model_copy(update={"seed": (self.seed + number) % 2**40})


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
def prefill_together(model: Decoder, prompts: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "B D"], list[Any]]:
    """As `prefill` of each prompt from its beginning, in one pass: the final hidden states, and the state of each.

    Shorter prompts are filled up at the left, by a document of their own, so that all end together.
    """
    longest, device = max(map(len, prompts)), model.embedding.weight.device
    if longest % 128 == 0 and min(map(len, prompts)) < longest:
        longest += 1  # packed rows of whole blocks go to flex_attention on a GPU, which is compiled for each length
    filled = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * more + list(prompt) for more, prompt in zip(filled, prompts, strict=True)], device=device)
    lengths = [[more, len(prompt)] if more else [longest] for more, prompt in zip(filled, prompts, strict=True)]
    hidden, state = model.advance(ids, documents=Documents.from_lengths(lengths, device))
    return hidden[:, -1], [_row(state, i, more) for i, more in enumerate(filled)]


def _row(state: Any, row: int, filled: int) -> Any:
    """Of a batch's state, without the places of `filled` tokens before the row's own."""
    own = state.map(lambda tensor: tensor[row : row + 1])
    if caches := getattr(own, "caches", []):
        kept = [replace(c, key=c.key[:, :, filled:], value=c.value[:, :, filled:]) for c in caches]
        own = replace(own, caches=kept)
    return own


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    *,
    end_of_document: int | None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next id of every prompt; None for one that has ended.

    A prompt's continuation depends on (prompt, sampling) alone, not on the other prompts of the batch, where
    `sampling` is one config for each; where it is one for all, also on the prompt's index, so that equal prompts
    differ.  `ends(row, token)` is asked once of every id, and ends its row; it is what knows of stop texts.

    Raises UserError for an empty prompt, or one that leaves no room in the context.
    """
    limit = model.config.context_limit
    check_prompts(prompts, limit)
    device, rows = model.embedding.weight.device, range(len(prompts))
    each = [sampling for _ in rows] if isinstance(sampling, SamplingConfig) else list(sampling)
    index = rows if isinstance(sampling, SamplingConfig) else [0 for _ in rows]
    generators = [torch.Generator().manual_seed(s.seed * 1_000_003 + i) for s, i in zip(each, index, strict=True)]
    read = [prefill(model, prompt) for prompt in prompts]
    hidden, states = torch.cat([hidden for hidden, _ in read]), [state for _, state in read]
    state = type(states[0]).stack(states)
    seen = [seen_of(model, prompt) for prompt in prompts]
    lengths, alive = [len(prompt) for prompt in prompts], [True for _ in rows]
    for made in range(1, 1 + max(s.max_new_tokens for s in each)):
        logits = model.logits(hidden).float().cpu()
        chosen = [choose(logits[i], each[i], generators[i], seen[i]) if alive[i] else None for i in rows]
        for i, token in enumerate(chosen):
            if token is None:
                continue
            lengths[i] += 1
            seen[i][token] = True
            full = made == each[i].max_new_tokens or (limit is not None and lengths[i] >= limit)
            alive[i] = not (token == end_of_document or ends(i, token) or full)
        yield chosen
        if not any(alive):
            return
        # Ended rows decode a dummy token, so that the batch keeps its shape; nobody reads it.
        step = torch.tensor([[token if token is not None else 0] for token in chosen], device=device)
        out, state = model.advance(step, state)
        hidden = out[:, -1]


def seen_of(model: LanguageModel, ids: Sequence[int] = ()) -> Tensor:
    """Of each id of the vocabulary, whether it is among `ids`: bool `[V]`, on the CPU."""
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    seen[torch.tensor(list(ids), dtype=torch.long)] = True
    return seen


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


def choose(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator, seen: Tensor | None = None) -> int:
    """One id from fp32 `logits [V]`: repetition penalty on those of `seen [V]`, temperature, top-k, top-p and min-p.

    Top-p (Holtzman et al. 2019, arXiv 1904.09751) is of what top-k left; min-p (Nguyen et al. 2024, arXiv 2407.01082)
    of the most likely token's probability.  The penalty is that of CTRL (Keskar et al. 2019, arXiv 1909.05858), which
    divides; a logit below 0 is multiplied, so that it becomes less likely too.

    Raises NonFiniteError when the logits are no numbers to choose by.
    """
    if not logits.max().isfinite():  # NaN wherever one is
        raise NonFiniteError(
            "the model's logits are not finite: its weights or its state are broken; use another checkpoint"
        )
    if sampling.repetition_penalty != 1 and seen is not None:
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.greedy:
        return int(logits.argmax())
    probabilities, ids = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities, ids = probabilities[: sampling.top_k], ids[: sampling.top_k]
    # A token stays when the ones before it hold less than top_p of what top-k left: the first always does.
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities * (before < sampling.top_p * probabilities.sum())
    kept = kept * (probabilities >= sampling.min_p * probabilities[0])
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


@torch.no_grad()
def choose_rows(
    logits: Float[Tensor, "n V"],
    samplings: Sequence[SamplingConfig],
    draws: Sequence[float],
    seen: Bool[Tensor, "n V"] | None = None,
) -> Int[Tensor, " n"]:
    """An id of every row where the logits, fp32, are: what `choose` may choose, by the rules and shares of `choose`.

    `draws`, uniform in [0, 1), say which: the first id, in order of probability, up to which so much of what is kept
    lies.  A row depends on nothing in the other rows.  What logits that are not finite give has no meaning.
    """
    device, vocab_size = logits.device, logits.shape[1]
    columns = torch.tensor(
        [
            (1.0 if s.greedy else s.temperature, s.top_k or vocab_size, s.top_p, s.min_p, s.repetition_penalty, draw)
            for s, draw in zip(samplings, draws, strict=True)
        ],
        dtype=torch.float32,
    )
    temperature, top_k, top_p, min_p, penalty, draw = columns.to(device).unsqueeze(-1).unbind(1)
    if seen is not None:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    likeliest = logits.argmax(-1)
    if all(s.greedy for s in samplings):
        return likeliest
    probabilities, ids = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    probabilities = probabilities * (torch.arange(vocab_size, device=device) < top_k)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < top_p * probabilities.sum(-1, keepdim=True))
    kept = kept * (probabilities >= min_p * probabilities[:, :1])
    below = kept.cumsum(-1)
    place = (below <= draw * below[:, -1:]).sum(-1).minimum((kept > 0).sum(-1) - 1).clamp(min=0)
    drawn = ids.gather(1, place[:, None])[:, 0]
    return torch.where(torch.tensor([s.greedy for s in samplings], device=device), likeliest, drawn)
