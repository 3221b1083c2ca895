"""Documents' ids go in; train.bin, val.bin and bins.json come out."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.collect import Counts, Taken
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.bins import BIN_NAMES, BLOCK_BYTES, BinFile, hash_blocks, write_record
from lfm.data.format import SPLITS, Split, id_dtype
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import sync

FEWEST_TOKENS = 1000
"""Of a data set of .bin files: less is a wrong path rather than a corpus."""


class BinsWriter:
    """Appends documents to the files of their splits; used as a context, and finished after it.

    `tail` None: what `add` says decides the split, and validation.txt is the text of val.bin, documents end to end.
    Otherwise the last max(1, int(n * tail)) of all n ids are the validation split: the cut may fall into a document,
    so neither file's documents and text are counted.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        separator: Literal["eod", "none"],
        tail: float | None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._separator = separator
        self._tail = tail
        self._block_bytes = block_bytes
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._stored = np.dtype(self._dtype).newbyteorder("<")
        self._paths: dict[Split, Path] = {split: folder / BIN_NAMES[split] for split in SPLITS}
        self._files = {split: open(path, "wb") for split, path in self._paths.items()}
        self._text = open(folder / "validation.txt", "wb") if tail is None else None
        self._num_tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._num_documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "BinsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), *([self._text] if self._text is not None else [])):
            file.close()

    def add(self, split: Split, ids: np.ndarray, *, num_documents: int, text_bytes: int, text: bytes) -> None:
        """Append documents; `ids` are all that is to be stored of them, `text` what they stand for."""
        if self._tail is not None:
            split = "train"  # until `finish` knows how many ids there are
        assert len(ids) == 0 or ids.max() < self._tokenizer.vocab_size
        self._files[split].write(ids.astype(self._stored).tobytes())
        if self._text is not None and split == "validation":
            self._text.write(text)
        self._num_tokens[split] += len(ids)
        self._num_documents[split] += num_documents
        self._text_bytes[split] += text_bytes

    def finish(self) -> dict[Split, BinFile]:
        """Cut off the tail if that is wanted and write bins.json; all is on the disk afterwards."""
        if self._tail is not None:
            self._move_tail(max(1, int(self._num_tokens["train"] * self._tail)))
        else:
            sync(self._folder / "validation.txt")
        found: dict[Split, BinFile] = {split: self._finished(split) for split in SPLITS}
        write_record(
            self._folder,
            {
                "dtype": self._dtype,
                "vocab_size": self._tokenizer.vocab_size,
                "eod_id": self._tokenizer.eod_id,
                "separator": self._separator,
                "tokenizer_sha256": self._tokenizer.sha256,
                "block_bytes": self._block_bytes,
                "files": found,
            },
        )
        return found

    def _finished(self, split: Split) -> BinFile:
        path = self._paths[split]
        sync(path)
        return BinFile(
            num_tokens=self._num_tokens[split],
            num_documents=self._num_documents[split] if self._tail is None else None,
            text_bytes=self._text_bytes[split] if self._tail is None else None,
            xxh64=hash_blocks(path, self._block_bytes),
        )

    def _move_tail(self, num_tokens: int) -> None:
        kept = self._num_tokens["train"] - num_tokens
        with open(self._paths["train"], "r+b") as train, open(self._paths["validation"], "wb") as validation:
            train.seek(kept * self._stored.itemsize)
            shutil.copyfileobj(train, validation, 1 << 20)
            train.truncate(kept * self._stored.itemsize)
        self._num_tokens = {"train": kept, "validation": num_tokens}


def write_bins(
    config: PrepareConfig, tokenizer: Tokenizer, taken: Iterable[Taken], stages: Counts, folder: Path
) -> dict[Split, BinFile]:
    """The files of both splits.  Raises UserError if there are fewer than `FEWEST_TOKENS` ids."""
    tail = config.validation_fraction if config.validation == "tail" else None
    with BinsWriter(folder, tokenizer, separator=config.separator, tail=tail) as writer:
        for batch in taken:
            if tail is not None:  # in the order of the documents
                text_bytes = int(batch.num_bytes.sum())
                writer.add("train", batch.ids, num_documents=len(batch.lengths), text_bytes=text_bytes, text=b"")
                continue
            for split in SPLITS:
                ids, lengths, text_bytes = batch.of_split(split)
                writer.add(split, ids, num_documents=len(lengths), text_bytes=text_bytes, text=batch.validation_text)
    num_tokens = stages["encode"]["tokens"]
    if num_tokens < FEWEST_TOKENS:
        raise UserError(
            f"the text of all sources is {num_tokens} ids, fewer than the {FEWEST_TOKENS} that format=bins needs; "
            "add text"
        )
    return writer.finish()
