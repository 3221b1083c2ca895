"""A data set of flat files of ids, and the reader of one split.

    <path>/tokenizer.json     the tokenizer that made the ids
    <path>/train.bin          ids end to end, little-endian, no header: uint16, or uint32 for more than 65,536 ids
    <path>/val.bin            the same: the validation split
    <path>/bins.json          a `BinsRecord` by data_pipeline.prepare; files from elsewhere come without it

A row is a window of `seq_length` ids and counts as one document, whatever documents it holds.

With bins.json the sizes are checked at open, and each block of a file is hashed when a row first touches it.  Without,
the ids themselves are all that can be checked.  Each failure is a UserError that names the file.
"""

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from lfm.data.batch import Batch
from lfm.data.format import FORMAT_VERSION, TOKENIZER_NAME, Split, SplitIndex, id_dtype
from lfm.data.order import random_order
from lfm.data.reader import RowReader
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import exists, json_checksum, open_file, read_file, write_durably

BINS_NAME = "bins.json"
BIN_NAMES: dict[Split, str] = {"train": "train.bin", "validation": "val.bin"}
BLOCK_BYTES = 1 << 24

_SAMPLE_BYTES = 1 << 20


class BinFile(BaseModel):
    """One file of ids."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_tokens: int
    """Ids in the file."""
    num_documents: int | None
    """None: the file begins or ends inside a document."""
    text_bytes: int | None
    """UTF-8 bytes of its text; None as above."""
    xxh64: tuple[str, ...]
    """Of each block of `block_bytes`; the last block may be shorter."""


class BinsRecord(BaseModel):
    """The content of bins.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eod_id: int
    separator: Literal["eod", "none"]
    """Whether the end-of-document id follows each document."""
    tokenizer_sha256: str
    """Of the bytes of the data set's tokenizer.json."""
    block_bytes: int
    files: dict[Split, BinFile]
    checksum: str
    """sha256 of everything else in bins.json."""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write bins.json from the fields of a `BinsRecord`, without format_version and checksum."""
    record = {"format_version": FORMAT_VERSION, **record}
    record = BinsRecord.model_validate({**record, "checksum": ""}).model_dump(mode="json")
    write_durably(folder / BINS_NAME, json.dumps({**record, "checksum": json_checksum(record)}).encode())


def read_record(folder: Path) -> BinsRecord | None:
    """bins.json, or None if `folder` has none.  Raises UserError if it is damaged or of another format version."""
    path = folder / BINS_NAME
    again = "restore it, or delete it if the .bin files are from elsewhere"
    if not exists(path):
        return None
    try:
        tree = json.loads(read_file(path))
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not valid JSON; {again}") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version={version} and this lfm reads {FORMAT_VERSION}; {again}")
    try:
        record = BinsRecord.model_validate(tree)
    except ValidationError:
        record = None
    if record is None or record.checksum != json_checksum(tree):
        raise UserError(f"{path} is damaged: its checksum does not match its contents; {again}")
    return record


def hash_blocks(path: Path, block_bytes: int) -> tuple[str, ...]:
    """xxh64 of each block of a file."""
    with open_file(path) as file:
        return tuple(xxhash.xxh64_hexdigest(block) for block in iter(lambda: file.read(block_bytes), b""))


class BinReader(RowReader):
    """Windows of train.bin or val.bin.  Safe to call from several threads.

    sequential: row r is the window at r * seq_length; the incomplete one at the end is left out.
    random (training only): row r is the window at r, and the order draws rows uniformly and with replacement.
    """

    def __init__(
        self, folder: Path | str, split: Split, *, seq_length: int, windows: Literal["sequential", "random"]
    ) -> None:
        """Raises UserError for a missing file, one of a wrong size, a damaged bins.json and a foreign tokenizer."""
        self.folder = Path(folder)
        self._path = self.folder / BIN_NAMES[split]
        file = self._open()
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)
        size = os.fstat(self._descriptor).st_size
        tokenizer = Tokenizer.from_file(self.folder / TOKENIZER_NAME)
        record = read_record(self.folder)
        if record is not None and record.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{self._path} is of another tokenizer than {self.folder / TOKENIZER_NAME}; "
                "restore that file or prepare the data set again with overwrite=true"
            )
        dtype = record.dtype if record is not None else id_dtype(tokenizer.vocab_size)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._record = record
        self._file = record.files[split] if record is not None else None
        self._verified: set[int] = set()
        self._lock = threading.Lock()

        width = self._dtype.itemsize
        if self._file is not None and size != self._file.num_tokens * width:
            raise self._changed(f"has {size} bytes instead of {self._file.num_tokens * width}")
        if size % width != 0:
            raise UserError(
                f"{self._path} has {size} bytes, no multiple of {width}, and a vocabulary of {tokenizer.vocab_size} is "
                f"stored as {dtype}; restore it, or put the tokenizer.json that made it beside it"
            )
        self._random = windows == "random" and split == "train"
        num_tokens, needed = size // width, seq_length + (2 if self._random else 1)
        if num_tokens < needed:
            raise UserError(
                f"{self._path} holds {num_tokens} ids, fewer than the {needed} that rows of seq_length={seq_length} "
                "need; take a smaller seq_length or prepare more text"
            )
        self._stride = 1 if self._random else seq_length
        self.index = SplitIndex(
            format_version=FORMAT_VERSION,
            split=split,
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            dtype=dtype,
            eod_id=tokenizer.eod_id,
            tokenizer_sha256=tokenizer.sha256,
            num_rows=num_tokens - seq_length - 1 if self._random else num_tokens // seq_length,
            num_tokens=num_tokens,
            num_padding=0,
            num_documents=self._file and self._file.num_documents,
            text_bytes=self._file and self._file.text_bytes,
            checksum=self._identity(size, tokenizer, seq_length),
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        seq_length = self.index.seq_length
        ids = torch.empty(len(rows), seq_length, dtype=torch.int64)
        table = ids.numpy()
        for i, row in enumerate(rows):
            assert 0 <= row < len(self), f"row {row} of {len(self)}"
            table[i] = self._read_window(int(row) * self._stride)
        return Batch(ids, [[seq_length] for _ in rows])

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        return random_order(seed, len(self), start, count) if self._random else super().order(seed, start, count)

    def _read_window(self, first: int) -> np.ndarray:
        """`seq_length` ids from the `first`-th on, as stored."""
        width, count = self._dtype.itemsize, self.index.seq_length
        self._verify(first * width, (first + count) * width)
        ids = np.frombuffer(self._bytes(first * width, count * width), self._dtype)
        if ids.max() >= self.index.vocab_size:
            where = int(np.argmax(ids >= self.index.vocab_size))
            raise UserError(
                f"{self._path} has id {ids[where]} at position {first + where}, past the vocab_size="
                f"{self.index.vocab_size} of its tokenizer.json; put the tokenizer.json that made it beside it"
            )
        return ids

    def _verify(self, start: int, stop: int) -> None:
        """Make sure that the blocks that hold the bytes `start .. stop - 1` are what was written."""
        if self._record is None or self._file is None:
            return
        block_bytes = self._record.block_bytes
        with self._lock:
            for block in range(start // block_bytes, (stop - 1) // block_bytes + 1):
                if block not in self._verified:
                    begin, end = block * block_bytes, self._file.num_tokens * self._dtype.itemsize
                    content = self._bytes(begin, min(block_bytes, end - begin))
                    if xxhash.xxh64_hexdigest(content) != self._file.xxh64[block]:
                        raise self._changed(f"is damaged: its xxh64 from byte {begin} on is another")
                    self._verified.add(block)

    def _bytes(self, start: int, count: int) -> bytes:
        # Not a memory map: a file that is cut while it is mapped kills the process instead of raising.
        try:
            content = os.pread(self._descriptor, count, start)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}; check the disk it is on") from None
        if len(content) < count:
            raise self._changed("changed while in use: it is shorter than when it was opened")
        return content

    def _open(self) -> BinaryIO:
        if not exists(self._path):
            present = " and ".join(name for name in BIN_NAMES.values() if exists(self.folder / name))
            raise UserError(
                f"{self._path} does not exist and {self.folder} holds {present or 'no .bin file'}; put it there, or "
                "prepare the data set with format=bins"
            )
        return open_file(self._path)

    def _identity(self, size: int, tokenizer: Tokenizer, seq_length: int) -> str:
        """What a checkpoint remembers of the data: its content, and how rows are cut out of it."""
        if self._record is not None:
            content = self._record.checksum
        else:
            # Files of many gigabytes are not read whole just to be told apart.
            sample = min(size, _SAMPLE_BYTES)
            ends = self._bytes(0, sample) + self._bytes(size - sample, sample)
            content = [size, tokenizer.sha256, xxhash.xxh64_hexdigest(ends)]
        facts = [content, self._path.name, seq_length, "random" if self._random else "sequential"]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _changed(self, what: str) -> UserError:
        way_out = "restore it from a copy or prepare the data set again with overwrite=true"
        if self._file is not None:
            way_out += f", or delete {BINS_NAME} if another file was put there on purpose"
        return UserError(f"{self._path} {what}; {way_out}")
