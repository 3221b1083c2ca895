"""Held-out loss of a model as a compressor: bits per byte, next to general compressors on the same text."""

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lfm.data.batch import Batch
from lfm.data.reader import RowReader
from lfm.errors import UserError
from lfm.job.ranks import Ranks
from lfm.models.language_model import LanguageModel
from lfm.objectives.next_token import NEXT_TOKEN


@torch.no_grad()
def score(model: LanguageModel, batch: Batch) -> tuple[float, int]:
    """(sum of cross entropy in nats, number of labels) of packed rows; the model is left in eval mode."""
    model.eval()
    rows = batch.to(model.embedding.weight.device)
    return float(model.losses(rows, NEXT_TOKEN).sums["cross_entropy"]), rows.documents.num_labels


Score = Callable[[Batch], tuple[float, int]]
"""An engine's `evaluate`: rows to (sum of nats, number of labels)."""


@dataclass(frozen=True)
class HeldOut:
    """Sums over rows of a validation split."""

    nats: float
    labels: int
    tokens: int
    """Text and end-of-document tokens, padding left out."""
    token_counts: np.ndarray
    """How often each id occurs, padding left out."""
    masked: bool = False
    """Whether some ids may not be labels, so that the loss is not that of the text."""
    text_bytes: float = 0.0
    """Of the text in these rows: all of the split's, or in the proportion of their tokens; 0: not known."""

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats per label."""
        return self.nats / max(1, self.labels)

    def bits_per_byte(self, text_bytes: float, vocab_size: int) -> float:
        """Total code length over the UTF-8 bytes of the text.

        A token without a label (the first of each document piece) is charged log2(vocab_size) bits, as if sent raw:
        every byte of the text is paid for.  Raises UserError where a mask leaves bytes out.
        """
        self.check_all_is_paid_for()
        unlabelled = self.tokens - self.labels
        return (self.nats / math.log(2) + unlabelled * math.log2(vocab_size)) / text_bytes

    def unigram_bits_per_byte(self, text_bytes: int) -> float:
        """Entropy of the held-out tokens' own frequencies: no model of single tokens can do better.

        Raises UserError where a mask leaves bytes out.
        """
        self.check_all_is_paid_for()
        counts = self.token_counts[self.token_counts > 0]
        return float(-(counts * np.log2(counts / counts.sum())).sum() / text_bytes)

    def check_all_is_paid_for(self) -> None:
        """Raises UserError where a mask leaves bytes out."""
        if self.masked:
            raise UserError(
                f"bits per byte are of whole texts, and a mask makes {self.labels:,} of the {self.tokens:,} held-out "
                "ids labels; compare losses, or take data prepared with labels=all"
            )


def together(parts: Sequence[HeldOut]) -> HeldOut:
    """The sums over all parts: each label counts once, wherever it is."""
    return HeldOut(
        nats=sum(part.nats for part in parts),
        labels=sum(part.labels for part in parts),
        tokens=sum(part.tokens for part in parts),
        token_counts=np.sum([part.token_counts for part in parts], axis=0),
        masked=any(part.masked for part in parts),
        text_bytes=sum(part.text_bytes for part in parts) if all(part.text_bytes for part in parts) else 0.0,
    )


def evaluate(
    score: Score, rows: RowReader, *, max_rows: int | None = None, batch_rows: int = 8, ranks: Ranks | None = None
) -> HeldOut:
    """Score `max_rows` rows of a split (all by default), which are spread over all of it, in order."""
    places, ranks = spread(max_rows, len(rows)), ranks or Ranks()
    nats, labels, tokens, masked = 0.0, 0, 0, False
    histogram = np.zeros(rows.index.vocab_size, dtype=np.int64)
    for first in range(0, len(places), batch_rows):
        chosen = places[first : first + batch_rows]
        batch = ranks.together(lambda chosen=chosen: rows.read(chosen))
        batch_nats, batch_labels = score(batch)
        nats, labels = nats + batch_nats, labels + batch_labels
        masked |= batch.label_mask is not None and not bool(batch.label_mask.all())
        for row, row_ids, row_lengths in zip(chosen, batch.ids.numpy(), batch.lengths, strict=True):
            text = row_ids[: len(row_ids) - rows.num_padding(row, row_lengths)]
            tokens += len(text)
            np.add.at(histogram, text, 1)
    text_bytes = (rows.index.text_bytes or 0) * tokens / max(1, rows.index.num_tokens)
    return HeldOut(nats, labels, tokens, histogram, masked, text_bytes)


def spread(max_rows: int | None, num_rows: int) -> list[int]:
    """Places of so many rows (of all for None), at equal distances: rows lie in the order of their sources, and the
    first ones are of the first source alone."""
    count = min(max_rows or num_rows, num_rows)
    return [i * num_rows // count for i in range(count)]


def compressor_bits_per_byte(text: bytes, found: HeldOut) -> dict[str, float]:
    """What `gzip -9` and `xz -9e` need for the same bytes, to be set beside what was `found`.

    Raises UserError where a mask leaves bytes out.
    """
    found.check_all_is_paid_for()
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
