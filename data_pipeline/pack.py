"""Documents to rows of equal length."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_pipeline.sources import Document
from lfm.data.tokenizer import Tokenizer

Row = tuple[np.ndarray, list[int]]


class GreedyPacker:
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
        """The last, padded row, if one is begun, and the number of pad positions in all rows."""
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


class OneDocumentPacker:
    """Gives each document, of at most `seq_length` ids, a row of its own and pads it; rows are as above."""

    def __init__(self, seq_length: int, eod_id: int) -> None:
        self._seq_length = seq_length
        self._eod_id = eod_id
        self._num_padding = 0

    def add(self, ids: np.ndarray) -> Iterator[Row]:
        """The row of one document."""
        padding = self._seq_length - len(ids)
        self._num_padding += padding
        yield np.concatenate([ids, np.full(padding, self._eod_id, np.uint32)]), [len(ids)] + [1] * padding

    def finish(self) -> tuple[None, int]:
        """No row is left; the number of pad positions in all rows."""
        return None, self._num_padding


def cut_to_row(
    document: Document, ids: np.ndarray, *, seq_length: int, tokenizer: Tokenizer, counts: Counter[str]
) -> tuple[Document, np.ndarray]:
    """The first `seq_length` ids and the text that they stand for; what is cut off is added to `counts`."""
    if len(ids) <= seq_length:
        return document, ids
    kept = ids[:seq_length]
    # A character whose bytes are only partly kept decodes to U+FFFD.
    text = tokenizer.decode(kept.tolist()).rstrip("\ufffd")
    cut = Document(text, len(text.encode()), document.origin)
    counts["documents_cut"] += 1
    counts["tokens_cut"] += len(ids) - seq_length
    counts["bytes_cut"] += document.num_bytes - cut.num_bytes
    return cut, kept
