"""Documents to rows of equal length.

Documents come many at a time: ids, integers `[total]`, end to end, and `lengths`, int64 `[documents]`, each 1 or more.
A row is ids `[seq_length]` and the lengths of the pieces of documents in it, int32 `[pieces]`.

Where only some ids are labels, those carry `LABEL_BIT`.  Packers move ids about without a look at them, so that a label
is one wherever it goes, and padding is none.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

Row = tuple[np.ndarray, np.ndarray]

LABEL_BIT = np.uint32(1 << 31)
"""In the uint32 of an id, of which no vocabulary has so many."""

WINDOW_TOKENS = 1 << 22
"""How many ids `BestFitPacker` holds back to choose from."""


class GreedyPacker:
    """Lays documents end to end and cuts the line into rows: nothing is dropped, and only the last row is padded."""

    num_cropped = 0

    def __init__(self, seq_length: int, eod_id: int) -> None:
        self._seq_length = seq_length
        self._eod_id = eod_id
        self._ids = np.empty(0, np.uint32)  # of the row that is begun
        self._lengths = np.empty(0, np.int64)
        self.num_padding = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Iterator[Row]:
        """Append documents; yields the rows they complete."""
        ids = np.concatenate([self._ids, ids])
        ends = np.cumsum(np.concatenate([self._lengths, lengths]))
        row_ends = np.arange(self._seq_length, len(ids) + 1, self._seq_length)
        cuts = np.union1d(ends, row_ends)
        pieces = np.diff(cuts, prepend=0)
        *full, rest = np.split(pieces, np.searchsorted(cuts, row_ends, side="right"))
        for row, row_lengths in enumerate(full):
            yield ids[row * self._seq_length : (row + 1) * self._seq_length], row_lengths.astype(np.int32)
        self._ids, self._lengths = ids[len(full) * self._seq_length :].copy(), rest

    def finish(self) -> Iterator[Row]:
        """The last, padded row, if one is begun."""
        if len(self._ids) > 0:
            row, padding = _padded([self._ids], self._lengths, self._seq_length, self._eod_id)
            self.num_padding += padding
            yield row


class OneDocumentPacker:
    """Gives each document, of at most `seq_length` ids, a row of its own and pads it."""

    num_cropped = 0

    def __init__(self, seq_length: int, eod_id: int) -> None:
        self._seq_length = seq_length
        self._eod_id = eod_id
        self.num_padding = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Iterator[Row]:
        """A row for each document."""
        for document in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []:
            row, padding = _padded([document], np.array([len(document)]), self._seq_length, self._eod_id)
            self.num_padding += padding
            yield row

    def finish(self) -> Iterator[Row]:
        """No row is left."""
        return iter(())


class BestFitPacker:
    """Gives each document the row that it fills best, and splits only those that are longer than a row.

    Of a longer document, full rows are cut off.  What is left, and all shorter documents, are held back until there are
    `window_tokens` ids of them, and then put, the longest first, each into the row with the least room that holds it
    (best-fit decreasing), the rest of a row being padding.  A single id that is left over has no label: it is cropped,
    so that all pieces of one id at the end of a row are padding.
    """

    def __init__(self, seq_length: int, eod_id: int, window_tokens: int = WINDOW_TOKENS) -> None:
        self._seq_length = seq_length
        self._eod_id = eod_id
        self._window_tokens = window_tokens
        self._held: list[np.ndarray] = []
        self._held_tokens = 0
        self.num_padding = 0
        self.num_cropped = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Iterator[Row]:
        """Take documents in; yields full rows of long ones and, when the window is full, all rows in it."""
        whole_row = np.array([self._seq_length], np.int32)
        starts = np.cumsum(lengths) - lengths
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            end = start + length
            while end - start >= self._seq_length:
                yield ids[start : start + self._seq_length], whole_row
                start += self._seq_length
            if end - start == 1:
                self.num_cropped += 1
            elif end > start:
                self._held.append(ids[start:end])
                self._held_tokens += end - start
                if self._held_tokens >= self._window_tokens:
                    yield from self._rows_of_window()

    def finish(self) -> Iterator[Row]:
        """The rows of what is still held."""
        yield from self._rows_of_window()

    def _rows_of_window(self) -> Iterator[Row]:
        pieces = sorted(self._held, key=len, reverse=True)  # stable: equal lengths stay in order
        self._held, self._held_tokens = [], 0
        rows: list[list[np.ndarray]] = []
        room: list[tuple[int, int]] = []  # (free ids, row), sorted
        for piece in pieces:
            best = bisect_left(room, (len(piece), -1))
            if best < len(room):
                free, row = room.pop(best)
            else:
                free, row = self._seq_length, len(rows)
                rows.append([])
            rows[row].append(piece)
            if free - len(piece) > 1:
                insort(room, (free - len(piece), row))
        for row in rows:
            lengths = np.array([len(piece) for piece in row])
            packed, padding = _padded(row, lengths, self._seq_length, self._eod_id)
            self.num_padding += padding
            yield packed


class SplitCounter:
    """How many documents the greedy packing would cut in two or more, whatever the packing is."""

    def __init__(self, seq_length: int) -> None:
        self._seq_length = seq_length
        self._position = 0
        self.num_split = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count documents that follow those before."""
        ends = self._position + np.cumsum(lengths)
        first_row, last_row = (ends - lengths) // self._seq_length, (ends - 1) // self._seq_length
        self.num_split += int(np.count_nonzero(first_row != last_row))
        self._position += int(lengths.sum())


def _padded(pieces: list[np.ndarray], lengths: np.ndarray, seq_length: int, eod_id: int) -> tuple[Row, int]:
    """A row of pieces and padding, and the number of pad positions: pieces of one id, which have no label."""
    padding = seq_length - int(lengths.sum())
    ids = np.concatenate([*pieces, np.full(padding, eod_id, pieces[0].dtype)])
    return (ids, np.concatenate([lengths, np.ones(padding, np.int64)]).astype(np.int32)), padding
