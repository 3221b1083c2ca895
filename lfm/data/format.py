"""The data set of shards on disk, and the writer of one split.

    <path>/tokenizer.json     the tokenizer that made the ids
    <path>/train/             MDS shards and their index.json
    <path>/validation/        the same

A row is exactly `seq_length` ids and the lengths of the documents, or pieces of documents, that fill it:

    ids          uint16 or uint32 [seq_length]
    doc_lengths  int32 [number of pieces], each >= 1, their sum is seq_length

A document ends with the end-of-document id.  How documents become rows is the split's `packing`:

    greedy          end to end; one too long for the rest of a row goes on in the next row as a new piece, and only the
                    tail of the last row is padding
    one_document    each row is the beginning of one document, cut to seq_length; what it leaves free is padding
    best_fit        whole documents, chosen to fill the row, and padding; only documents longer than a row are split

The label of a position is the next id of the same piece, so padding (the end-of-document id, each position a piece of
its own) has no labels and needs no mask.

index.json is MDSWriter's, with one more top-level key, "lfm": a `SplitIndex`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lfm.data import streaming_shim
from lfm.errors import UserError
from lfm.files import exists, json_checksum, read_file, sync, write_durably

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
HASH = "xxh64"

Split = Literal["train", "validation"]
Packing = Literal["greedy", "one_document", "best_fit"]


class SplitIndex(BaseModel):
    """What is known about a split: in index.json, beyond the list of its shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int
    split: Split
    seq_length: int
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    eod_id: int
    tokenizer_sha256: str
    """Of the bytes of the data set's tokenizer.json."""
    num_rows: int
    num_tokens: int
    """Ids of text and ends of documents, without padding."""
    num_padding: int
    num_documents: int | None
    """None: not known."""
    text_bytes: int | None
    """UTF-8 bytes of the text in the split; with a loss per token this gives bits per byte.  None: not known."""
    packing: Packing = "greedy"
    checksum: str
    """sha256 of everything else in index.json, so that damage to it is noticed too."""


def id_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrower of the two stored dtypes that holds ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def read_index(folder: Path) -> tuple[SplitIndex, list[dict[str, Any]]]:
    """The record of the split in `folder`, and MDS's description of each shard in row order.

    Raises UserError if index.json is missing, damaged, of another split than the folder's name says, of another format
    version or not made by data_pipeline.prepare.
    """
    path = folder / INDEX_NAME
    again = "restore the file or prepare the data set again with overwrite=true"
    if not exists(path):
        raise UserError(f"{path} does not exist, so {folder} is no split of a data set; {again}")
    try:
        tree = json.loads(read_file(path))
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not valid JSON; {again}") from None
    if not (isinstance(tree, dict) and isinstance(tree.get("lfm"), dict)):
        raise UserError(f"{path} was not made by data_pipeline.prepare: it has no `lfm` record; {again}")
    version = tree["lfm"].get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version={version} and this lfm reads {FORMAT_VERSION}; {again}")
    damaged = UserError(f"{path} is damaged: its checksum does not match its contents; {again}")
    try:
        index, shards = SplitIndex.model_validate(tree["lfm"]), tree["shards"]
    except (ValidationError, KeyError):
        raise damaged from None
    if index.checksum != _checksum(tree):
        raise damaged
    if folder.name in SPLITS and folder.name != index.split:
        raise UserError(
            f"{path} is that of the {index.split} split; put the folders of the two splits back in their places"
        )
    return index, shards


def split_row(data: bytes, seq_length: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[seq_length]` and document lengths of one stored row, without a copy.  Raises ValueError if it is none.

    MDS stores columns by name: the size of doc_lengths in 4 bytes; a byte of (number of axes) * 4 + log2 of the bytes
    of a length of an axis, which here is one; that length; the values; and then the ids.
    """
    ids_bytes = seq_length * np.dtype(dtype).itemsize
    if len(data) < 5 + ids_bytes or 4 + int.from_bytes(data[:4], "little") + ids_bytes != len(data):
        raise ValueError(f"{len(data)} bytes are no row of {seq_length} ids")
    lengths_at, ids_at = 5 + (1 << (data[4] & 3)), len(data) - ids_bytes
    lengths = np.frombuffer(data, "<i4", offset=lengths_at, count=(ids_at - lengths_at) // 4)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=ids_at), lengths


class RowWriter:
    """Writes one split.  Until `finish` returns, the folder has no valid index and no reader takes it for a split."""

    def __init__(
        self, folder: Path, *, seq_length: int, vocab_size: int, shard_bytes: int, compression: str | None
    ) -> None:
        """Raises UserError if `shard_bytes` (size of a raw shard file) does not hold one row."""
        self.folder = folder
        self._dtype = id_dtype(vocab_size)
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        longest_row = seq_length * (np.dtype(self._dtype).itemsize + 4) + 1024  # with every piece of length 1; header
        if shard_bytes < longest_row:
            raise UserError(
                f"shard_bytes={shard_bytes} does not hold a row of seq_length={seq_length}; set it to {longest_row} "
                "or more (tens of millions are usual)"
            )
        columns = {"ids": f"ndarray:{self._dtype}:{seq_length}", "doc_lengths": "ndarray:int32"}
        self._writer = streaming_shim.make_writer(
            folder, columns, compression=compression, hashes=[HASH], shard_bytes=shard_bytes
        )

    def write(self, ids: np.ndarray, doc_lengths: Sequence[int] | np.ndarray) -> None:
        """Append a row: integer ids `[seq_length]` and the lengths of its pieces."""
        lengths = np.asarray(doc_lengths, np.int32)
        assert ids.shape == (self._seq_length,) and 0 <= ids.min() and ids.max() < self._vocab_size
        assert lengths.min() >= 1 and lengths.sum() == self._seq_length
        self._writer.write({"ids": ids.astype(self._dtype), "doc_lengths": lengths})

    def finish(
        self,
        *,
        split: Split,
        eod_id: int,
        tokenizer_sha256: str,
        num_tokens: int,
        num_padding: int,
        num_documents: int,
        text_bytes: int,
        packing: Packing = "greedy",
    ) -> SplitIndex:
        """Write the last shard, force all shards to the disk, then write the index.  The folder is then a split."""
        self._writer.finish()
        path = self.folder / INDEX_NAME
        tree = json.loads(path.read_bytes())
        record = {
            "format_version": FORMAT_VERSION,
            "split": split,
            "seq_length": self._seq_length,
            "vocab_size": self._vocab_size,
            "dtype": self._dtype,
            "eod_id": eod_id,
            "tokenizer_sha256": tokenizer_sha256,
            "num_rows": sum(shard["samples"] for shard in tree["shards"]),
            "num_tokens": num_tokens,
            "num_padding": num_padding,
            "num_documents": num_documents,
            "text_bytes": text_bytes,
            "packing": packing,
        }
        tree["lfm"] = record
        record["checksum"] = _checksum(tree)
        for shard in self.folder.iterdir():
            sync(shard)
        write_durably(path, json.dumps(tree, sort_keys=True).encode())
        return SplitIndex.model_validate(record)


def _checksum(tree: dict[str, Any]) -> str:
    """Of the content of an index.json, leaving out the checksum in it."""
    record = {key: value for key, value in tree["lfm"].items() if key != "checksum"}
    return json_checksum({**tree, "lfm": record})
