"""Continuations as text: stop texts, and why each one ended."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lfm.data.tokenizer import Tokenizer
from lfm.inference.sampling import SamplingConfig, generate
from lfm.models.language_model import LanguageModel

FinishReason = Literal["stop", "end_of_document", "length", "context"]
"""A stop text; the end of the document; max_new_tokens; the model's context is full."""


class StopFilter:
    """Passes text on until the first stop text is complete, of which nothing is given out.

    Held back is only what may still become a stop text.  What is given does not depend on how the text is cut into
    pieces: of stop texts that are complete at the same character, the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that `piece` settles."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(text.find(stop), len(stop)) for stop in self._stops if stop in text]
        if places:
            self.found, self._held = True, ""
            start, _ = min(places, key=lambda place: (sum(place), place[0]))
            return text[:start]
        # The longest end of the text with which a stop text begins.
        longest = min(len(text), max((len(stop) for stop in self._stops), default=1) - 1)
        held = next(
            (n for n in range(longest, 0, -1) if text.endswith(tuple(s[:n] for s in self._stops if n < len(s)))), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _character_of(before: bytes, byte: bytes) -> int:
    """The number of the character that this byte is in, behind those before it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    count = len(decoder.decode(before)) + len(decoder.decode(byte))
    is_within = bool(decoder.getstate()[0])
    return count if is_within else max(0, count - 1)


@dataclass
class Continuation:
    """What follows one prompt, as far as it is made."""

    text: str = ""
    """Without the stop text."""
    tokens: list[int] = field(default_factory=list)
    """Ids without the end of the document; those of a stop text are among them."""
    finish_reason: FinishReason | None = None
    """None while it goes on."""


class Writer:
    """Makes the continuation of one prompt from its ids, as they come."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingConfig) -> None:
        self.made = Continuation()
        self._tokenizer, self._max_new_tokens = tokenizer, sampling.max_new_tokens
        self._decoder, self._stops = tokenizer.stream_decoder(prompt), StopFilter(sampling.stop)
        self.start = 0
        """Where the text of the token taken last begins in that of all taken, stop texts among them, in characters."""
        self._num_decoded, self._held = 0, b""

    def take(self, token: int) -> bool:
        """Whether the continuation ends with this id, but for the model's context."""
        if token == self._tokenizer.eod_id:
            self.end("end_of_document")
            return True
        self.made.tokens.append(token)
        text = self._decoder.push(token)
        self._place(token, text)
        self.made.text += self._stops.push(text)
        if self._stops.found or len(self.made.tokens) == self._max_new_tokens:
            self.end("length")
        return self.made.finish_reason is not None

    def _place(self, token: int, text: str) -> None:
        """Note where a token begins, which completes this text: its own, and that of tokens held back before it."""
        before, self._num_decoded = self._num_decoded, self._num_decoded + len(text)
        own = self._tokenizer.text_of(token) if self._held else ""
        if not self._held:
            self.start = before
        elif text and text.endswith(own) and "\ufffd" not in own:
            self.start = self._num_decoded - len(own)
        else:
            self.start = before + _character_of(self._held, self._tokenizer.bytes_of(token)[:1])
        self._held = b"" if text else self._held + self._tokenizer.bytes_of(token)

    def end(self, reason: FinishReason) -> None:
        """For this reason, unless a stop text is complete."""
        if not self._stops.found:
            self.made.text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        self.made.finish_reason = "stop" if self._stops.found else reason


def continuations(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig],
) -> Iterator[list[Continuation]]:
    """Continue prompts, as `generate` does; the same list is given after each step, in order of the prompts."""
    each = [sampling for _ in prompts] if isinstance(sampling, SamplingConfig) else list(sampling)
    writers = [Writer(tokenizer, prompt, of) for prompt, of in zip(prompts, each, strict=True)]
    found = [writer.made for writer in writers]
    for _ in generate(model, prompts, sampling, end_of_document=None, ends=lambda row, token: writers[row].take(token)):
        yield found
    for writer in writers:
        if writer.made.finish_reason is None:
            writer.end("context")
    yield found
