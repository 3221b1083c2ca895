"""One split of a data set: documents with their ids go in, shards and counts come out."""

from pathlib import Path

import numpy as np

from data_pipeline.pack import GreedyPacker, OneDocumentPacker
from data_pipeline.sources import Document
from lfm.data.format import Packing, RowWriter, Split, SplitIndex
from lfm.data.tokenizer import Tokenizer
from lfm.files import sync


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
        packer = OneDocumentPacker if packing == "one_document" else GreedyPacker
        self._packer = packer(seq_length, tokenizer.eod_id)
        self._rows = RowWriter(
            folder / split,
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            shard_bytes=shard_bytes,
            compression=compression,
        )
        self._text = open(folder / f"{split}.txt", "wb") if keep_text else None
        self._num_tokens = self._num_documents = self._text_bytes = 0

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Append a document; `ids` are its ids and the end-of-document id, as far as the packing keeps them."""
        for row, lengths in self._packer.add(ids):
            self._rows.write(row, lengths)
        if self._text is not None:
            self._text.write(document.text.encode())
        self._num_tokens += len(ids)
        self._num_documents += 1
        self._text_bytes += document.num_bytes

    def finish(self) -> SplitIndex:
        """Write what is left, and the index; all of it is on the disk afterwards."""
        last, num_padding = self._packer.finish()
        if last is not None:
            self._rows.write(*last)
        if self._text is not None:
            self._text.close()
            sync(Path(self._text.name))
        return self._rows.finish(
            split=self._split,
            eod_id=self._tokenizer.eod_id,
            tokenizer_sha256=self._tokenizer.sha256,
            num_tokens=self._num_tokens,
            num_padding=num_padding,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            packing=self._packing,
        )
