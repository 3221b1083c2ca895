"""Several streams of rows as one: which stream a position takes its row from, in closed form.

From some position on, streams are mixed in whole-numbered parts, such as 7 and 3.  Those 10 positions are a cycle that
repeats: each cycle has exactly 7 rows of one stream and 3 of the other, spread evenly.  So how many rows of a stream
come before a position is a product and a look-up, each stream goes through its own epochs at its own pace, and there
is no state but the position.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lfm.data.batch import Batch, joined
from lfm.data.format import LABEL_MASK
from lfm.data.reader import RowReader

LONGEST_CYCLE = 10_000


@dataclass(frozen=True)
class Segment:
    """How streams are mixed from a position on."""

    from_row: int
    parts: tuple[int, ...]
    """Rows of each stream in a cycle."""


def cycle_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to `weights`, the smallest there are.

    If their sum would be above LONGEST_CYCLE, that many rows are given out by largest remainder.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = math.lcm(*(share.denominator for share in shares))
    if length <= LONGEST_CYCLE:
        return tuple(int(share * length) for share in shares)
    parts = [int(share * LONGEST_CYCLE) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (parts[i] - shares[i] * LONGEST_CYCLE, i))
    for i in by_remainder[: LONGEST_CYCLE - sum(parts)]:
        parts[i] += 1
    common = math.gcd(*parts)
    return tuple(part // common for part in parts)


@lru_cache(maxsize=16)
def _cycle(parts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The stream of each position of a cycle, `[M]`, and the rows of each stream before it, `[M, streams]`."""
    # Row k of a stream with n rows belongs at (2k + 1) / 2n of the cycle; compared as whole numbers, which never tie
    # differently on another machine.
    whole = math.lcm(*(part for part in parts if part))
    due = [(2 * np.arange(part, dtype=object) + 1) * (whole // part) if part else [] for part in parts]
    owner = np.repeat(np.arange(len(parts)), parts)[np.argsort(np.concatenate(due), kind="stable")]
    before = np.cumsum(owner[:, None] == np.arange(len(parts)), axis=0) - (owner[:, None] == np.arange(len(parts)))
    return owner, before


class MixedReader(RowReader):
    """The rows of several readers, numbered through, in an order that mixes them."""

    def __init__(self, readers: Sequence[RowReader], segments: Sequence[Segment]) -> None:
        """All readers have rows of one length, the same columns and ids of one tokenizer.

        The first segment is from position 0 on.
        """
        assert segments[0].from_row == 0 and all(len(segment.parts) == len(readers) for segment in segments)
        self.folder = readers[0].folder
        self._readers = list(readers)
        # Where nothing changes no segment begins: what was mixed is then told by the segments alone.
        self._segments = [s for i, s in enumerate(segments) if i == 0 or s.parts != segments[i - 1].parts]
        self._first_rows = np.cumsum([0, *(len(reader) for reader in readers)])
        indexes = [reader.index for reader in readers]
        assert len({(index.seq_length, index.tokenizer_sha256) for index in indexes}) == 1
        self.columns = readers[0].columns
        assert all(reader.columns == self.columns for reader in readers)
        self.index = indexes[0].model_copy(
            update={
                "num_rows": sum(index.num_rows for index in indexes),
                "num_tokens": sum(index.num_tokens for index in indexes),
                "num_padding": sum(index.num_padding for index in indexes),
                "num_documents": None,
                "text_bytes": None,
                "num_labels": None
                if LABEL_MASK not in self.columns
                else sum(index.num_labels or 0 for index in indexes),
                "checksum": hashlib.sha256(json.dumps([index.checksum for index in indexes]).encode()).hexdigest(),
            }
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        chosen = np.asarray(rows, np.int64)
        owner = np.searchsorted(self._first_rows, chosen, side="right") - 1
        wheres = [np.flatnonzero(owner == number) for number in range(len(self._readers))]
        parts = [
            reader.read(chosen[where] - first)
            for reader, where, first in zip(self._readers, wheres, self._first_rows[:-1], strict=True)
            if len(where) or reader is self._readers[0]
        ]
        return joined(parts, order=np.argsort(np.concatenate(wheres)))

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        rows = np.empty(count, np.int64)
        used, owner = self.used(start), self._owners(start, count)
        for number, reader in enumerate(self._readers):
            where = np.flatnonzero(owner == number)
            if len(where):
                own = reader.order(stream_seed(seed, number), int(used[number]), len(where))
                rows[where] = own + self._first_rows[number]
        return rows

    def used(self, position: int) -> np.ndarray:
        """Rows of each stream at the positions before `position`, over all its epochs, int64 `[streams]`."""
        total = np.zeros(len(self._readers), np.int64)
        for segment, end in self._bounded():
            covered = min(position, end or position) - segment.from_row
            if covered > 0:
                cycles, rest = divmod(covered, sum(segment.parts))
                total += cycles * np.array(segment.parts) + _cycle(segment.parts)[1][rest]
        return total

    def identity(self, position: int) -> str:
        # Of what is behind only: later proportions, and streams that had no part yet, may change.
        past = [
            [
                segment.from_row,
                [[i, self._readers[i].index.checksum, part] for i, part in enumerate(segment.parts) if part],
            ]
            for segment in self._segments
            if segment.from_row < max(1, position)
        ]
        if len(past) == 1 and all(i == 0 for i, _, _ in past[0][1]):
            return self._readers[0].identity(position)  # as if it had been alone
        return hashlib.sha256(json.dumps(past).encode()).hexdigest()

    def num_padding(self, row: int, doc_lengths: Sequence[int]) -> int:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._readers[number].num_padding(row - int(self._first_rows[number]), doc_lengths)

    def _owners(self, start: int, count: int) -> np.ndarray:
        """The stream of each position `start .. start + count - 1`."""
        positions = np.arange(start, start + count)
        owner = np.empty(count, np.int64)
        for segment, end in self._bounded():
            here = (positions >= segment.from_row) & (positions < (end or start + count))
            cycle = _cycle(segment.parts)[0]
            owner[here] = cycle[(positions[here] - segment.from_row) % len(cycle)]
        return owner

    def _bounded(self) -> list[tuple[Segment, int | None]]:
        """Each segment and where it ends; None: never."""
        return list(zip(self._segments, [*(s.from_row for s in self._segments[1:]), None], strict=True))


def stream_seed(seed: int, number: int) -> int:
    """The seed of a stream's own order; the first has that of the run, as if it were alone."""
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
