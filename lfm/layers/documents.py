"""Where documents lie in a batch of packed rows: the one source of positions, resets, attention masks and labels."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class Documents:
    """Document boundaries of a `[B, T]` batch.

    `lengths[b]` are the document lengths of row `b`, in order, on the host; they sum to T.  `positions` restart at 0
    with every document.  `row_is_one_document` says that no row holds a boundary inside it.
    """

    lengths: tuple[tuple[int, ...], ...]
    positions: Int[Tensor, "B T"]
    row_is_one_document: bool

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], device: torch.device | str) -> "Documents":
        """Raises ValueError unless every row has the same total length and every document at least one token."""
        totals = {sum(row) for row in lengths}
        if len(totals) != 1 or any(length < 1 for row in lengths for length in row):
            raise ValueError(f"document lengths must be positive and sum to one row length, not {sorted(totals)}")
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
        frozen = tuple(tuple(int(length) for length in row) for row in lengths)
        return cls(frozen, positions.to(device, non_blocking=True), all(len(row) == 1 for row in frozen))

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
        ends = itertools.accumulate((length for row in self.lengths for length in row), initial=0)
        return torch.tensor(list(ends), dtype=torch.int32).to(self.positions.device, non_blocking=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(length for row in self.lengths for length in row)

    def slice_rows(self, start: int, stop: int) -> "Documents":
        """The documents of rows `start:stop`."""
        lengths = self.lengths[start:stop]
        return Documents(lengths, self.positions[start:stop], all(len(row) == 1 for row in lengths))

    def labels(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The next id of the same document; IGNORED_LABEL at the last token of each document."""
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[:, :-1] = torch.where(self.starts[:, 1:], IGNORED_LABEL, ids[:, 1:])
        return labels

    @property
    def num_labels(self) -> int:
        """How many positions have a label, counted on the host."""
        return sum(length - 1 for row in self.lengths for length in row)

    @property
    def attended_pairs(self) -> int:
        """Causal (query, key) pairs inside documents: what the attention core really computes."""
        return sum(length * (length + 1) // 2 for row in self.lengths for length in row)
