"""One split of a data set: documents' ids go in, shards and counts come out."""

from pathlib import Path

import numpy as np

from data_pipeline.pack import BestFitPacker, GreedyPacker, OneDocumentPacker
from lfm.data.format import Packing, RowWriter, Split, SplitIndex
from lfm.data.tokenizer import Tokenizer
from lfm.files import sync

_PACKERS = {"greedy": GreedyPacker, "one_document": OneDocumentPacker, "best_fit": BestFitPacker}


class SplitWriter:
    """Packs documents into the rows of `folder`/`split`; with `keep_text`, also into `folder`/`split`.txt.

    The text file is the documents end to end, nothing between them, so that compressors can be compared with a model
    in bits per byte on exactly `text_bytes` bytes.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        packing: Packing,
        shard_bytes: int,
        compression: str | None,
        keep_text: bool,
    ) -> None:
        self._split: Split = split
        self._tokenizer = tokenizer
        self._packing: Packing = packing
        self._packer = _PACKERS[packing](seq_length, tokenizer.eod_id)
        self._rows = RowWriter(
            folder / split,
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            shard_bytes=shard_bytes,
            compression=compression,
        )
        self._text = open(folder / f"{split}.txt", "wb") if keep_text else None
        self._num_tokens = self._num_documents = self._text_bytes = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray, *, text_bytes: int, text: bytes) -> None:
        """Append documents: ids end to end, as many a document as `lengths` says; `text` is what they stand for."""
        for row, piece_lengths in self._packer.add(ids, lengths):
            self._rows.write(row, piece_lengths)
        if self._text is not None:
            self._text.write(text)
        self._num_tokens += len(ids)
        self._num_documents += len(lengths)
        self._text_bytes += text_bytes

    @property
    def num_cropped(self) -> int:
        """Ids that the packing left out."""
        return self._packer.num_cropped

    def finish(self) -> SplitIndex:
        """Write what is left, and the index; all of it is on the disk afterwards."""
        for row, piece_lengths in self._packer.finish():
            self._rows.write(row, piece_lengths)
        if self._text is not None:
            self._text.close()
            sync(Path(self._text.name))
        return self._rows.finish(
            split=self._split,
            eod_id=self._tokenizer.eod_id,
            tokenizer_sha256=self._tokenizer.sha256,
            num_tokens=self._num_tokens - self.num_cropped,
            num_padding=self._packer.num_padding,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            packing=self._packing,
        )
