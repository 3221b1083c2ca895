"""Perplexity and bits per byte of files: documents as a whole, or windows that move by a stride."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from lfm.config import Config
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.evaluation.intervals import Interval, paired_interval
from lfm.evaluation.scoring import score_rows
from lfm.files import read_file, shown
from lfm.models.language_model import LanguageModel

_BLOCK_BYTES, _MOST_BLOCKS = 2048, 4096


class WindowConfig(Config):
    context: int = Field(default=0, ge=0, le=1 << 24)
    """Score a text in windows of so many tokens; 0: of the model's context, and where that has no limit the text as a
    whole, its state carried."""
    stride: int = Field(default=0, ge=0, le=1 << 24)
    """Windows begin so many tokens apart: each token but those of the first window has at least context - stride
    before it; 0: half a window."""


@dataclass(frozen=True)
class Document:
    """A text to be scored; blocks, stretches of bytes, are what intervals are drawn over."""

    name: str
    data: bytes
    block_bytes: int

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each block."""
        starts = np.arange(0, len(self.data), self.block_bytes)
        return np.minimum(len(self.data) - starts, self.block_bytes)


@dataclass(frozen=True)
class TextScore:
    name: str
    nats: float
    """Summed over `labels`."""
    labels: int
    """Tokens that follow another, or the beginning-of-text id."""
    num_bytes: int
    block_bits: np.ndarray
    """Code length of each block, float64; as in `HeldOut.bits_per_byte` a first token that is no label is sent raw."""
    lost: int = 0
    """Characters that the tokenizer does not give back: they have no bits."""

    @property
    def perplexity(self) -> float | None:
        """Per token: no measure between tokenizers; None where no token follows another."""
        return math.exp(min(self.nats / self.labels, 700)) if self.labels else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the UTF-8 text, the same measure for every tokenizer; None where some of it is lost."""
        return None if self.lost else float(self.block_bits.sum()) / self.num_bytes

    def record(self) -> dict[str, float | int | str | None]:
        """As JSON values."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "tokens": self.labels,
            "nats": self.nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "characters_lost": self.lost,
        }


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """The files, a document each.  Raises UserError for one that cannot be read or is empty."""
    contents = [read_file(path) for path in paths]
    for path, data in zip(paths, contents, strict=True):
        if not data:
            raise UserError(f"{shown(path)} is empty; give a file of text")
    block = max(_BLOCK_BYTES, sum(map(len, contents)) // _MOST_BLOCKS)
    return [Document(str(path), data, block) for path, data in zip(paths, contents, strict=True)]


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first that is scored) of windows over so many tokens, each of which but the first is scored once."""
    scored, begin = 1, 0
    while scored < count:
        end = min(begin + context, count)
        yield begin, end, scored
        scored, begin = end, begin + stride


def check_windows(config: WindowConfig, limit: int | None) -> tuple[int, int] | None:
    """Context and stride for a model with this limit; None: whole texts.  Raises UserError for what does not fit."""
    if not config.context and limit is None:
        if config.stride:
            raise UserError(f"stride={config.stride} is of windows, and this model reads whole texts; give context too")
        return None
    context = config.context or limit or 0
    if limit is not None and context > limit:
        raise UserError(f"context={context} is more than the model's {limit}; give {limit} or less, or leave it out")
    if context < 2:
        raise UserError(f"context={context} leaves no token before the one that is scored; give 2 or more")
    stride = config.stride or max(1, context // 2)
    if stride >= context:
        raise UserError(f"stride={stride} leaves windows of {context} nothing in common; give less than {context}")
    return context, stride


def score_texts(
    model: LanguageModel, tokenizer: Tokenizer, documents: Sequence[Document], config: WindowConfig, *, batch_size: int
) -> list[TextScore]:
    """Score each document by itself, without an end behind it.  Raises UserError as `check_windows` does."""
    of_windows = check_windows(config, model.config.context_limit)
    rows, firsts, owners, texts = [], [], [], []
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for number, document in enumerate(documents):
        try:
            ids, starts = tokenizer.encode_bytes(document.data)
        except UserError as error:
            raise UserError(f"{shown(document.name)}: {error}") from None
        whole = [*begin, *ids]
        texts.append((ids, starts))
        cuts = windows(len(whole), *of_windows) if of_windows else [(0, len(whole), 1)] if len(whole) > 1 else []
        for start, end, first in cuts:
            rows.append(whole[start:end])
            firsts.append(first - start)
            owners.append(number)
    parts = score_rows(model, rows, first=firsts, batch_size=batch_size)
    found = []
    for number, (document, (ids, starts)) in enumerate(zip(documents, texts, strict=True)):
        own = [part.nats for part, owner in zip(parts, owners, strict=True) if owner == number]
        nats = torch.cat(own).numpy() if own else np.empty(0)
        raw = np.full(len(ids) - len(nats), math.log(model.config.vocab_size))
        bits = np.zeros(len(document.sizes))
        np.add.at(bits, np.array(starts, np.int64) // document.block_bytes, np.concatenate([raw, nats]) / math.log(2))
        lost = tokenizer.lost(document.data.decode(errors="replace"), ids).total()
        found.append(TextScore(document.name, float(nats.sum()), len(nats), len(document.data), bits, lost))
    return found


def together(scores: Sequence[TextScore]) -> TextScore:
    """All documents as one: each token and each byte counts once."""
    return TextScore(
        name="together",
        nats=sum(score.nats for score in scores),
        labels=sum(score.labels for score in scores),
        num_bytes=sum(score.num_bytes for score in scores),
        block_bits=np.concatenate([score.block_bits for score in scores]),
        lost=sum(score.lost for score in scores),
    )


def difference(one: TextScore, other: TextScore, sizes: np.ndarray) -> Interval | None:
    """In bits per byte, with its interval over blocks of text; None where there is one block, or text is lost."""
    if len(sizes) < 2 or one.lost or other.lost:
        return None
    return paired_interval(one.block_bits, other.block_bits, sizes)
