"""Continuous batching: sequences join and leave between steps, and each is continued as if it were alone."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lfm.config import Config
from lfm.errors import NonFiniteError
from lfm.inference.prefixes import Prefixes
from lfm.inference.rows import CudaGraph, Rows
from lfm.inference.sampling import (
    SamplingConfig,
    check_prompts,
    choose_rows,
    prefill,
    prefill_together,
    seen_of,
)
from lfm.models.decoder import Decoder
from lfm.models.language_model import LanguageModel


class BatcherConfig(Config):
    slots: int = Field(default=16, ge=1, le=1024)
    """Sequences that are continued together."""
    prefill_tokens: int | None = Field(default=None, ge=16, le=65_536)
    """Of prompts, that are read between two steps, so that others go on; null: 256, or 8192 on a CUDA device.  Of a
    long one a piece of so many is read, 1024 at most."""
    reuse_mib: int = Field(default=256, ge=0, le=1 << 20)
    """For states after prompts' pieces, so that a prompt that begins alike is not read again; 0: none."""
    fixed_width: bool = False
    """Every step computes all slots: slower with few sequences, but then an answer has the same bits whoever else is
    answered, with experts but for rounding on a CPU; without it, but for rounding everywhere."""
    cuda_graph: CudaGraph = "auto"
    """auto: on a CUDA device steps are recorded once and replayed."""


@dataclass
class Token:
    id: int
    logprob: float | None = None
    """Natural logarithm of its probability by the model itself: before temperature and all that follows it."""
    likeliest: list[tuple[int, float]] = field(default_factory=list)
    """Ids and logprobs, as many as were asked for."""


@dataclass(eq=False)
class Request:
    """A prompt that is continued; `batcher` moves it on."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    logprobs: int | None = None
    """Give logprobs, and those of so many of the likeliest tokens; None: no logprobs."""
    made: list[int] = field(default_factory=list)
    """Ids of the continuation."""
    read: int = 0
    """Tokens of the prompt that are in the state."""
    reused: int = 0
    """Of them, those that were not read anew."""
    ended: bool = False
    """No token follows: max_new_tokens or the context is full, or it was cancelled, or it failed."""
    error: NonFiniteError | None = None
    _state: Any = None
    _draws: torch.Generator = field(default_factory=torch.Generator)


LONGEST_PIECE = 1024


class Batcher:
    """Continues requests of one model.  Of a request that is chosen greedily the ids are those of `generate`, but for
    rounding; draws of others depend on (prompt, sampling) alone.  Not for several threads at once.
    """

    def __init__(self, model: LanguageModel, config: BatcherConfig) -> None:
        self.model, self.config = model, config
        self.rows = Rows(model, config.slots, fixed_width=config.fixed_width, cuda_graph=config.cuda_graph)
        self.prefill_tokens = config.prefill_tokens or (8192 if self.rows.device.type == "cuda" else 256)
        self.piece = min(self.prefill_tokens, LONGEST_PIECE)
        self.prefixes = Prefixes(self.piece, config.reuse_mib << 20)
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order of the rows."""
        self._seen: Tensor | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    def add(self, request: Request) -> None:
        """Raises UserError for a prompt that is empty or leaves no room in the context."""
        check_prompts([request.prompt], self.model.config.context_limit)
        request._draws.manual_seed(request.sampling.seed)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Free its slot; of one that has ended, nothing."""
        if request.ended:
            return
        request.ended = True
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.reading:
            self.reading.remove(request)
        else:
            self._leave(self.running.index(request))
        request._state = None

    def step(self) -> list[tuple[Request, Token]]:
        """One more token of every running request, then a piece of the prompts that wait; what was chosen, in order.

        A request with an `error` has ended without a token.
        """
        found = []
        if self.running:
            logits = self.rows.step([request.made[-1] for request in self.running])
            found += self._choose(list(self.running), logits)
        return found + self._read_prompts()

    def state_of(self, request: Request) -> dict[str, Tensor]:
        """Of a running request: the tensors `[1, ...]` of its state, but for caches, by name; none of others."""
        return self.rows.row_state(self.running.index(request)) if request in self.running else {}

    def load_of(self, request: Request) -> Tensor | None:
        """Of a running request: how often each expert was chosen for its continuation, `[L, E]`."""
        return self.rows.load(self.running.index(request)) if request in self.running else None

    def _read_prompts(self) -> list[tuple[Request, Token]]:
        """Pieces of prompts in turns, so that a short one does not wait for a long one; what comes new is first."""
        found, budget = [], self.prefill_tokens
        new: list[Request] = []
        while self.waiting and len(self.running) + len(self.reading) + len(new) < self.config.slots:
            request = self.waiting.popleft()
            request.reused, request._state = self.prefixes.find(request.prompt)
            request.read = request.reused
            new.append(request)
        self.reading.extendleft(reversed(new))
        while budget > 0 and self.reading:
            group = self._alike(budget)
            if len(group) > 1:
                for request in group:
                    self.reading.remove(request)
                hidden, states = prefill_together(self.model, [request.prompt for request in group])  # type: ignore[arg-type]
                for request, state in zip(group, states, strict=True):
                    request._state, request.read = state, len(request.prompt)
                budget -= len(group) * max(request.read for request in group)
                found += self._begin(group, hidden)
                continue
            request = self.reading.popleft()
            piece = request.prompt[request.read : request.read + self.piece]
            hidden, request._state = prefill(self.model, piece, request._state)
            request.read += len(piece)
            budget -= len(piece)
            if request.read % self.prefixes.every == 0:
                self.prefixes.keep(request.prompt[: request.read], request._state)
            if request.read < len(request.prompt):
                self.reading.append(request)
            else:
                found += self._begin([request], hidden)
        return found

    def _alike(self, budget: int) -> list[Request]:
        """The next prompt, with those of about its length that can be read in one pass with it."""
        first = self.reading[0]
        # With a fixed width bits of a row must not depend on how many there are.
        if self.config.fixed_width or not isinstance(self.model, Decoder):
            return [first]
        found: list[Request] = []
        for request in self.reading:
            length = len(request.prompt)
            if request.read or length >= self.piece or length.bit_length() != len(first.prompt).bit_length():
                if request is first:
                    return [first]
                continue
            if (len(found) + 1) * max(length, *(len(each.prompt) for each in found), 0) <= max(budget, length):
                found.append(request)
        return found

    def _begin(self, requests: list[Request], hidden: Tensor) -> list[tuple[Request, Token]]:
        """Continue requests whose prompts are read: their first tokens, from the final hidden states of the last."""
        for request in requests:
            self.rows.join(request._state, request.read)
            request._state = None
            self.running.append(request)
            if self._seen is not None:
                self._seen[len(self.running) - 1] = seen_of(self.model, request.prompt)
        with torch.no_grad():
            logits = self.model.logits(hidden).float()
        return self._choose(requests, logits)

    def _choose(self, requests: list[Request], logits: Tensor) -> list[tuple[Request, Token]]:
        """The next token of running requests, from their rows' logits."""
        samplings = [request.sampling for request in requests]
        draws = [
            0.0 if request.sampling.greedy else float(torch.rand((), generator=request._draws)) for request in requests
        ]
        seen = None
        if any(sampling.repetition_penalty != 1 for sampling in samplings):
            seen = self._seen_rows()[[self.running.index(request) for request in requests]]
        ids = choose_rows(logits, samplings, draws, seen)
        finite = logits.amax(-1).isfinite()  # NaN wherever one is
        chosen, is_finite = torch.stack((ids, finite.long())).tolist()
        tokens = [Token(id) for id in chosen]
        self._add_logprobs(requests, tokens, logits, ids)
        limit, found = self.model.config.context_limit, []
        for request, token, usable in zip(requests, tokens, is_finite, strict=True):
            row = self.running.index(request)
            if not usable:
                request.error = NonFiniteError("the model's logits are not finite: its weights or its state are broken")
                request.ended = True
                self._leave(row)
                continue
            request.made.append(token.id)
            if self._seen is not None:
                self._seen[row, token.id] = True
            found.append((request, token))
            full = limit is not None and len(request.prompt) + len(request.made) >= limit
            if full or len(request.made) == request.sampling.max_new_tokens:
                request.ended = True
                self._leave(row)
        return found

    def _add_logprobs(self, requests: list[Request], tokens: list[Token], logits: Tensor, ids: Tensor) -> None:
        asking = [i for i, request in enumerate(requests) if request.logprobs is not None]
        if not asking:
            return
        logprobs = logits[asking].log_softmax(-1)
        own = logprobs.gather(1, ids[asking][:, None])[:, 0].tolist()
        most = max(requests[i].logprobs or 0 for i in asking)
        best = logprobs.topk(min(most, logits.shape[1]), -1)
        for i, logprob, values, ids_of in zip(asking, own, best.values.tolist(), best.indices.tolist(), strict=True):
            count = requests[i].logprobs or 0
            tokens[i].logprob = logprob
            tokens[i].likeliest = list(zip(ids_of[:count], values[:count], strict=True))

    def _seen_rows(self) -> Tensor:
        """bool `[slots, V]`: of each running request, which ids prompt and continuation have; kept once it is used."""
        if self._seen is None:
            shape = (self.config.slots, self.model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.rows.device)
            for row, request in enumerate(self.running):
                self._seen[row] = seen_of(self.model, [*request.prompt, *request.made])
        return self._seen

    def _leave(self, row: int) -> None:
        self.rows.leave(row)
        last = len(self.running) - 1
        if self._seen is not None:
            self._seen[row] = self._seen[last]
        self.running[row] = self.running[last]
        self.running.pop()
