"""Documents to rows of equal length."""

from collections.abc import Iterator

import numpy as np

Row = tuple[np.ndarray, list[int]]


class Packer:
    """Lays documents end to end and cuts the line into rows: nothing is dropped, and only the last row is padded.

    A row is ids, uint32 `[seq_length]`, and the lengths of the pieces of documents in it.
    """

    def __init__(self, seq_length: int, eod_id: int) -> None:
        self._eod_id = eod_id
        self._ids = np.empty(seq_length, np.uint32)
        self._lengths: list[int] = []
        self._used = 0

    def add(self, ids: np.ndarray) -> Iterator[Row]:
        """Append one document; yields the rows it completes."""
        while len(ids) > 0:
            piece = ids[: len(self._ids) - self._used]
            ids = ids[len(piece) :]
            self._ids[self._used : self._used + len(piece)] = piece
            self._lengths.append(len(piece))
            self._used += len(piece)
            if self._used == len(self._ids):
                yield self._take_row()

    def finish(self) -> tuple[Row | None, int]:
        """The last, padded row, if one is begun, and the number of pad positions in it."""
        if self._used == 0:
            return None, 0
        num_padding = len(self._ids) - self._used
        self._ids[self._used :] = self._eod_id
        self._lengths += [1] * num_padding  # pieces of one id have no next id, hence no label
        return self._take_row(), num_padding

    def _take_row(self) -> Row:
        row = self._ids.copy(), self._lengths
        self._lengths, self._used = [], 0
        return row
