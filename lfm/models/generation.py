"""Sampling from any model with functional state: prefill each prompt, then decode all of them one token at a time."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Config, Count, CountOrZero
from lfm.errors import NonFiniteError, UserError
from lfm.files import read_file, shown, write_durably
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


class Conversation:
    """One sequence that goes on: text is read into the model's state, and replies are sampled from it.

    Nothing is read twice: the state is all that is kept, and in families without attention it does not grow.
    """

    def __init__(self, model: LanguageModel, sampling: SamplingConfig, *, end_of_document: int | None) -> None:
        self.model, self.sampling, self.end_of_document = model, sampling, end_of_document
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        self.state: Any = None
        self.hidden: Tensor | None = None
        """`[1, D]`, of the last token read; None before the first."""
        self.num_tokens = 0

    def read(self, ids: Sequence[int]) -> None:
        """Take `ids` into the state.  Raises UserError where the context has no room for them, and reads none."""
        limit = self.model.config.context_limit
        if limit is not None and self.num_tokens + len(ids) >= limit:
            raise UserError(
                f"{self.num_tokens} + {len(ids)} tokens leave no room in the context of {limit}; "
                "start anew, or give less"
            )
        if ids:
            self.hidden, self.state = prefill(self.model, ids, self.state)
            self.num_tokens += len(ids)

    def reply(self) -> Iterator[int]:
        """Sampled ids, each read into the state as it is given, until the end of a document, which is not read."""
        if self.hidden is None:
            raise UserError("there is nothing to reply to; give some text first")
        limit = self.model.config.context_limit
        for _ in range(self.sampling.max_new_tokens):
            if limit is not None and self.num_tokens + 1 >= limit:
                return
            token = choose(self.model.logits(self.hidden)[0].float().cpu(), self.sampling, self.generator)
            if token == self.end_of_document:
                return
            self.read([token])
            yield token

    def save(self, path: Path, *, checkpoint: str) -> None:
        """Write the state to a file; `checkpoint` identifies the weights that it belongs to."""
        if self.hidden is None:
            return
        content = {
            "checkpoint": checkpoint,
            "num_tokens": self.num_tokens,
            "hidden": self.hidden.cpu(),
            "state": {name: tensor.cpu() for name, tensor in self.state.tensors().items()},
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        saved = buffer.getvalue()
        write_durably(path, _STATE_HEADER + hashlib.sha256(saved).hexdigest().encode() + b"\n" + saved)

    def load(self, path: Path, *, checkpoint: str) -> None:
        """Go on from a saved state.  Raises UserError for a file that is none, is damaged, or is of other weights.

        Tensors must have the names, shapes and kinds of number of the model's own state, and finite values.
        """
        empty = self.model.empty_state(1)
        if empty is None or self.model.config.context_limit is not None:
            raise UserError(f"the state of {self.model.config.kind} grows with its text and is not kept in files")
        other = "give another file, or one that does not exist"
        data = read_file(path)
        if data.startswith(b"PK"):
            raise UserError(f"{shown(path)} was saved without a checksum, by an earlier version; {other}")
        if not data.startswith(_STATE_HEADER):
            raise UserError(f"{shown(path)} is not a saved state; {other}")
        found, _, saved = data.removeprefix(_STATE_HEADER).partition(b"\n")
        if found != hashlib.sha256(saved).hexdigest().encode():
            raise UserError(f"the state {shown(path)} is damaged: its checksum does not match its contents; {other}")
        try:
            with zipfile.ZipFile(io.BytesIO(saved)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > len(saved):
                    raise ValueError  # compressed, as no saved state is: it may fill the memory
            content = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            saved_by, num_tokens, hidden = content["checkpoint"], content["num_tokens"], content["hidden"]
            tensors = content["state"]
            if (
                type(num_tokens) is not int
                or num_tokens < 1
                or not all(isinstance(name, str) for name in tensors.keys())
            ):
                raise ValueError
        except Exception:  # whatever torch makes of a file that is something else
            raise UserError(f"{shown(path)} is not a saved state; {other}") from None
        if saved_by != checkpoint:
            raise UserError(f"the state {path} is of another model ({saved_by}, not {checkpoint}); give another file")
        try:
            _check_tensors(tensors, empty.tensors())
            _check_tensors({"hidden": hidden}, {"hidden": self.model.embedding.weight[:1]})
            self.state = empty.filled(tensors)
        except ValueError as error:
            raise UserError(f"{shown(path)}: {error}; {other}") from None
        self.hidden, self.num_tokens = hidden.to(self.model.embedding.weight), num_tokens


_STATE_HEADER = b"lfm state 2\n"
"""Then sha256 of what follows, and a torch.save.  The checksum finds damage; it does not say who wrote the file."""


def _check_tensors(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, unless `found` could be `wanted` with other values."""
    for name in sorted(found.keys() | wanted.keys()):
        tensor, own = found.get(name), wanted.get(name)
        if not isinstance(tensor, Tensor) or own is None:
            raise ValueError(f"{name} is {'missing' if own is not None else 'of no state of this model'}")
        if tensor.shape != own.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(own.shape)}")
        if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex() or tensor.layout != own.layout:
            raise ValueError(f"{name} is of {tensor.dtype}, not {own.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if not tensor.is_floating_point() and (tensor < 0).any():
            raise ValueError(f"{name} is a negative count")


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
