"""Where documents lie in a batch of packed rows: the one source of positions, resets, attention masks and labels."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED_LABEL = -100

Unit = Literal["label", "row", "document"]
"""What a term of the loss is a mean over."""
UNITS: tuple[Unit, ...] = ("label", "row", "document")
"""In the order of `Counts`."""


class NeedsTheHost(RuntimeError):
    """Something asks for numbers of a step that its device alone has."""


class _OfTheDeviceAlone(tuple[tuple[int, ...], ...]):
    """In place of lengths that change from one replay of a recorded step to the next."""

    def _refuse(self, *_: Any) -> Any:
        raise NeedsTheHost("documents are told apart by their lengths, which the host reads")

    __iter__ = __len__ = __getitem__ = _refuse


if TYPE_CHECKING:
    Lengths = tuple[tuple[int, ...], ...]
else:
    Lengths = Any  # whoever checked them at run time would read those of the device alone


@dataclass(frozen=True, eq=False)
class Documents:
    """Document boundaries of a `[B, T]` batch, and which of its ids may be labels.

    `lengths[b]` are the document lengths of row `b`, in order, on the host; they sum to T.  `positions` restart at 0
    with every document.  `row_is_one_document` says that no row holds a boundary inside it.
    """

    lengths: Lengths
    positions: Int[Tensor, "B T"]
    row_is_one_document: bool
    labels_by_row: tuple[int, ...]
    """How many positions of each row have a label, counted on the host."""
    label_mask: Bool[Tensor, "B T"] | None = None
    """Whether the id at a position may be a label, beside `positions`; None: every one may."""
    given_boundaries: Int[Tensor, " S"] | None = None
    """Of `on_device`."""

    @classmethod
    def on_device(
        cls,
        positions: Int[Tensor, "B T"],
        *,
        row_is_one_document: bool,
        label_mask: Bool[Tensor, "B T"] | None = None,
        boundaries: Int[Tensor, " S"],
    ) -> "Documents":
        """Documents of which the host knows nothing: of a step that is recorded once and replayed on others.

        `boundaries` may have more documents at the end, which are empty.  Raises NeedsTheHost where lengths are read.
        """
        return cls(_OfTheDeviceAlone(), positions, row_is_one_document, (), label_mask, boundaries)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[Sequence[int]],
        device: torch.device | str,
        label_mask: Bool[Tensor, "B T"] | None = None,
    ) -> "Documents":
        """`label_mask` is on the host.

        Raises ValueError unless every row has the same total length, that of the mask, and every document at least one
        token.
        """
        totals = {sum(row) for row in lengths}
        if len(totals) != 1 or any(length < 1 for row in lengths for length in row):
            raise ValueError(f"document lengths must be positive and sum to one row length, not {sorted(totals)}")
        frozen = tuple(tuple(int(length) for length in row) for row in lengths)
        flat = np.fromiter(itertools.chain.from_iterable(frozen), np.int64)
        first = np.repeat(flat.cumsum() - flat, flat)  # of each token's document, in the flattened batch
        positions = torch.from_numpy((np.arange(len(first)) - first).reshape(len(frozen), -1))
        if label_mask is None:
            counts = [sum(row) - len(row) for row in frozen]
        elif label_mask.shape != positions.shape:
            raise ValueError(
                f"label_mask has shape {list(label_mask.shape)}, the documents fill {list(positions.shape)}"
            )
        else:
            counts = (label_mask & (positions > 0)).sum(1).tolist()
            label_mask = label_mask.to(device, non_blocking=True)
        one_each = all(len(row) == 1 for row in frozen)
        return cls(frozen, positions.to(device, non_blocking=True), one_each, tuple(counts), label_mask)

    def to(self, device: torch.device | str) -> "Documents":
        """With their tensors on `device`."""
        mask = None if self.label_mask is None else self.label_mask.to(device, non_blocking=True)
        return dataclasses.replace(self, positions=self.positions.to(device, non_blocking=True), label_mask=mask)

    @classmethod
    def whole_rows(cls, batch: int, seq_length: int, device: torch.device | str) -> "Documents":
        """Every row is one document."""
        return cls.from_lengths([[seq_length]] * batch, device)

    @property
    def starts(self) -> Bool[Tensor, "B T"]:
        """True where a document begins: recurrent state is zero there."""
        return self.positions == 0

    @functools.cached_property
    def boundaries(self) -> Int[Tensor, " S"]:
        """Where each document of the flattened batch starts, and where the last one ends; int32, beside positions."""
        if self.given_boundaries is not None:
            return self.given_boundaries
        ends = itertools.accumulate((length for row in self.lengths for length in row), initial=0)
        return torch.tensor(list(ends), dtype=torch.int32).to(self.positions.device, non_blocking=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; of those of the device alone, of a row."""
        if self.given_boundaries is not None:
            return self.positions.shape[1]
        return max(length for row in self.lengths for length in row)

    def slice_rows(self, start: int, stop: int) -> "Documents":
        """The documents of rows `start:stop`."""
        lengths, rows = self.lengths[start:stop], slice(start, stop)
        mask = self.label_mask[rows] if self.label_mask is not None else None
        one_each = all(len(row) == 1 for row in lengths)
        return Documents(lengths, self.positions[rows], one_each, self.labels_by_row[rows], mask)

    def labels(self, ids: Int[Tensor, "B T"], ahead: int = 1) -> Int[Tensor, "B T"]:
        """The id `ahead` tokens on in the same document; IGNORED_LABEL where there is none or it may be no label."""
        is_label = self.positions[:, ahead:] >= ahead
        if self.label_mask is not None:
            is_label = is_label & self.label_mask[:, ahead:]
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[:, :-ahead] = torch.where(is_label, ids[:, ahead:], IGNORED_LABEL)
        return labels

    @property
    def num_labels(self) -> int:
        """How many positions have a label, counted on the host."""
        return sum(self.labels_by_row)

    @property
    def counts(self) -> "Counts":
        """What the terms of a loss are divided by, when these are all rows."""
        documents = sum(length > 1 for row in self.lengths for length in row)
        return Counts(labels=self.num_labels, rows=len(self.lengths), documents=documents)

    @property
    def attended_pairs(self) -> int:
        """Causal (query, key) pairs inside documents: what the attention core really computes."""
        return sum(length * (length + 1) // 2 for row in self.lengths for length in row)


@dataclass(frozen=True)
class Counts:
    """Numbers of labels, rows and documents of two ids or more, on the host: the denominators of a step's means."""

    labels: int
    rows: int
    documents: int

    def of(self, unit: Unit) -> int:
        """Of `label`, `row` or `document`; at least 1, so that a step without any divides by it."""
        return max(1, {"label": self.labels, "row": self.rows, "document": self.documents}[unit])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as a model takes them, on its device."""

    ids: Int[Tensor, "B T"]
    documents: Documents
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further columns that an objective reads, by name; their first dimension is B."""

    def columns(self, start: int, stop: int) -> "Rows":
        """Positions `start:stop` of every row, for what looks at ids and their labels alone: a document that began
        before them goes on with the positions that it had."""
        positions = self.documents.positions[:, start:stop]
        mask = self.documents.label_mask
        mask = mask[:, start:stop] if mask is not None else None
        window = dataclasses.replace(self.documents, positions=positions, label_mask=mask)
        return Rows(self.ids[:, start:stop], window, self.extras)

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows `start:stop`: a micro-batch."""
        extras = {name: column[start:stop] for name, column in self.extras.items()}
        return Rows(self.ids[start:stop], self.documents.slice_rows(start, stop), extras)
