"""The data set of shards on disk, and the writer of one split.

    <path>/tokenizer.json     the tokenizer that made the ids
    <path>/train/             MDS shards and their index.json
    <path>/validation/        the same

A row is exactly `seq_length` ids and the lengths of the documents, or pieces of documents, that fill it:

    ids          uint16 or uint32 [seq_length]
    doc_lengths  int32 [number of pieces], each >= 1, their sum is seq_length

Rows may have further columns, each of one size and type in all rows of the split:

    label_mask   uint8 [ceil(seq_length / 8)]: a bit an id, the first is the highest; 0: this id is no label
    any other    a number, or an array of a fixed shape, of one of COLUMN_DTYPES

Format 1 is rows without them, format 2 with.  A shard's table of columns in index.json says what its rows have.

A document ends with the end-of-document id.  How documents become rows is the split's `packing`:

    greedy          end to end; one too long for the rest of a row goes on in the next row as a new piece, and only the
                    tail of the last row is padding
    one_document    each row is the beginning of one document, cut to seq_length; what it leaves free is padding
    best_fit        whole documents, chosen to fill the row, and padding; only documents longer than a row are split

The label of a position is the next id of the same piece, so padding (the end-of-document id, each position a piece of
its own) has no labels and needs no mask.

index.json is MDS's, with one more top-level key, "lfm": a `SplitIndex`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lfm.data.mds import HASH, LARGEST_SHARD, VERSION, ShardWriter
from lfm.errors import UserError
from lfm.files import exists, json_checksum, read_file, shown, sync, write_durably

FORMAT_VERSION = 1
FORMAT_VERSION_OF_COLUMNS = 2
"""Of rows that have more than ids and lengths."""
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
LABEL_MASK = "label_mask"
COLUMN_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
"""Of further columns: those that tensors have."""
_MOST_AXES = 32
"""Of an array of NumPy's."""

Split = Literal["train", "validation"]
Packing = Literal["greedy", "one_document", "best_fit"]


class SplitIndex(BaseModel):
    """What is known about a split: in index.json, beyond the list of its shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format_version: int
    split: Split
    seq_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    eod_id: int
    tokenizer_sha256: str
    """Of the bytes of the data set's tokenizer.json."""
    num_rows: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    """Ids of text and ends of documents, without padding."""
    num_padding: int = Field(ge=0)
    num_documents: int | None
    """None: not known."""
    text_bytes: int | None
    """UTF-8 bytes of the text in the split; with a loss per token this gives bits per byte.  None: not known."""
    packing: Packing = "greedy"
    num_labels: int | None = None
    """Ids that are labels, where a mask says which; None: all that follow another of their piece."""
    checksum: str
    """sha256 of everything else in index.json, so that damage to it is noticed too."""


class _FileEntry(BaseModel):
    """What index.json says of a file of a shard."""

    model_config = ConfigDict(strict=True)

    # One plain name: it is joined to the folder, fetched into it and removed from it.  None of the cache's own begins
    # like this, and nothing in it means more than itself in a pattern or URL.
    basename: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,149}$")
    bytes: int = Field(ge=0)
    hashes: dict[str, str]

    @model_validator(mode="after")
    def _is_hashed(self) -> "_FileEntry":
        if HASH not in self.hashes:
            raise ValueError(f"hashes has no {HASH}")
        return self


class _ShardEntry(BaseModel):
    """What index.json says of a shard, as far as it is read here."""

    model_config = ConfigDict(strict=True)

    samples: int = Field(ge=1)
    raw_data: _FileEntry
    zip_data: _FileEntry | None
    compression: str | None
    column_names: list[str]
    column_encodings: list[str]

    @model_validator(mode="after")
    def _agrees(self) -> "_ShardEntry":
        if self.raw_data.bytes > LARGEST_SHARD:
            raise ValueError(f"a raw file of {self.raw_data.bytes} bytes is past what MDS can hold")
        if 4 * (self.samples + 2) > self.raw_data.bytes:
            raise ValueError(f"a raw file of {self.raw_data.bytes} bytes does not hold samples={self.samples}")
        if self.zip_data is not None and self.compression is None:
            raise ValueError("zip_data is of no compression")
        if len(self.column_names) != len(self.column_encodings):
            raise ValueError("column_names and column_encodings are not as many")
        return self


class _IndexFile(BaseModel):
    """index.json, in which the numbers of all parts agree."""

    lfm: SplitIndex
    shards: Annotated[list[_ShardEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees(self) -> "_IndexFile":
        if (total := sum(shard.samples for shard in self.shards)) != self.lfm.num_rows:
            raise ValueError(f"num_rows={self.lfm.num_rows}, and the samples of the shards are {total}")
        names = [INDEX_NAME]
        for shard in self.shards:
            names += [file.basename for file in (shard.raw_data, shard.zip_data) if file is not None]
        if len(set(names)) != len(names):
            raise ValueError(f"the basename {max(names, key=names.count)} is that of two files")
        return self


def id_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrower of the two stored dtypes that holds ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def read_index(folder: Path) -> tuple[SplitIndex, list[dict[str, Any]]]:
    """The record of the split in `folder`, and MDS's description of each shard in row order.

    What comes back can be relied on: every key that is read is there and of its type, file names are plain ones, and
    the numbers of rows agree with each other and fit into the files.

    Raises UserError if index.json is missing, damaged, wrong, of another split than the folder's name says, of another
    format version or not made by data_pipeline.prepare.
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
    if version not in (FORMAT_VERSION, FORMAT_VERSION_OF_COLUMNS):
        raise UserError(
            f"{path} has format_version={version} and this lfm reads {FORMAT_VERSION} and {FORMAT_VERSION_OF_COLUMNS}; "
            f"{again}"
        )
    if tree["lfm"].get("checksum") != _checksum(tree):
        raise UserError(f"{path} is damaged: its checksum does not match its contents; {again}")
    try:
        index = _IndexFile.model_validate(tree).lfm
    except ValidationError as error:
        raise UserError(f"{path} is wrong: {_first_problem(error)}; {again}") from None
    if folder.name in SPLITS and folder.name != index.split:
        raise UserError(
            f"{path} is that of the {index.split} split; put the folders of the two splits back in their places"
        )
    return index, tree["shards"]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "missing"):
        return f"{where}: {said}" if where else said
    if problem["type"] == "string_pattern_mismatch":
        said = "this is not one plain file name"
    value = problem["input"]
    return f"{where}={shown(value if isinstance(value, str) else repr(value)[:100])}: {said}"


@dataclass(frozen=True)
class Column:
    """A column that has the same type and shape in every row."""

    dtype: str
    shape: tuple[int, ...] = ()
    """(): a number."""

    @classmethod
    def of_encoding(cls, encoding: str) -> "Column":
        """By MDS's name of it, such as `float32` or `ndarray:float32:2,3`.  Raises ValueError for any other kind."""
        kind, *of = encoding.split(":")
        if kind == "ndarray" and len(of) == 2:
            column = cls(of[0], tuple(int(size) for size in of[1].split(",")))
        else:
            column = cls(encoding)
        if column.dtype not in COLUMN_DTYPES or min(column.shape, default=1) < 1 or len(column.shape) > _MOST_AXES:
            raise ValueError(encoding)
        return column

    @property
    def encoding(self) -> str:
        """MDS's name of it."""
        return f"ndarray:{self.dtype}:{','.join(map(str, self.shape))}" if self.shape else self.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def label_mask_column(seq_length: int) -> Column:
    """The packed mask of a row."""
    return Column("uint8", (math.ceil(seq_length / 8),))


class RowLayout:
    """Where the columns of a stored row are."""

    def __init__(self, seq_length: int, dtype: str, columns: Mapping[str, Column]) -> None:
        """`columns`: those beside ids and doc_lengths."""
        self.columns = dict(sorted(columns.items()))
        self._seq_length = seq_length
        self._fixed = {**columns, "ids": Column(dtype, (seq_length,))}
        # MDS stores columns by name, and only doc_lengths has a size that differs.
        self._before = sorted(name for name in self._fixed if name < "doc_lengths")
        self._after = sorted(name for name in self._fixed if name > "doc_lengths")
        self._bytes_before = sum(self._fixed[name].num_bytes for name in self._before)
        self._bytes_after = sum(self._fixed[name].num_bytes for name in self._after)

    @property
    def least_bytes(self) -> int:
        """Of a stored row, which has one document length or more."""
        return 4 + self._bytes_before + 6 + self._bytes_after

    @property
    def encodings(self) -> dict[str, str]:
        """MDS's names of all columns, as a shard's table has them."""
        return {name: encoding for name, (encoding, _) in self.table.items()}

    @property
    def table(self) -> dict[str, tuple[str, int | None]]:
        """MDS's names of all columns, and bytes of those that have as many in every row."""
        fixed = {name: (column.encoding, column.num_bytes) for name, column in self._fixed.items()}
        return dict(sorted({"doc_lengths": ("ndarray:int32", None), **fixed}.items()))

    def join(self, ids: np.ndarray, lengths: np.ndarray, columns: Mapping[str, np.ndarray | np.generic]) -> bytes:
        """The stored row that `split` takes apart: ids `[seq_length]`, document lengths, the other columns."""
        values = {**columns, "ids": ids}
        width = np.min_scalar_type(len(lengths)).itemsize
        shape = bytes([1 << 2 | width.bit_length() - 1]) + len(lengths).to_bytes(width, "little")
        stored = shape + lengths.astype("<i4").tobytes()
        before, after = (
            b"".join(values[name].astype(_little(self._fixed[name].dtype)).tobytes() for name in names)
            for names in (self._before, self._after)
        )
        return len(stored).to_bytes(4, "little") + before + stored + after

    def split(self, data: bytes) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Ids `[seq_length]`, document lengths, and the other columns of one stored row, without a copy.

        Raises ValueError if it is none.  The size of doc_lengths in 4 bytes comes first, then the columns; doc_lengths
        is a byte of (number of axes) * 4 + log2 of the bytes of a length of an axis, which here is one; that length;
        the values.
        """
        fixed, at = self._bytes_before + self._bytes_after, 4 + self._bytes_before
        if len(data) < 5 + fixed or 4 + int.from_bytes(data[:4], "little") + fixed != len(data):
            raise ValueError(f"{len(data)} bytes are no row of {self._seq_length} ids")
        lengths_at, end = at + 1 + (1 << (data[at] & 3)), len(data) - self._bytes_after
        lengths = np.frombuffer(data, "<i4", offset=lengths_at, count=(end - lengths_at) // 4)
        found = {}
        for names, place in ((self._before, 4), (self._after, end)):
            for name in names:
                column = self._fixed[name]
                values = np.frombuffer(data, _little(column.dtype), offset=place, count=math.prod(column.shape))
                found[name] = values.reshape(column.shape)
                place += column.num_bytes
        return found.pop("ids"), lengths, found


def _little(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def read_layout(folder: Path, index: SplitIndex, shards: Sequence[Mapping[str, Any]]) -> RowLayout:
    """That of the rows of a split, by its shards' tables of columns.

    Raises UserError naming the column that no batch can hold, or the shard whose rows have other columns than the
    first's.
    """
    path = folder / INDEX_NAME
    columns = {}
    for name, encoding in _table(shards[0]).items() if shards else ():
        if name in ("ids", "doc_lengths"):
            continue
        try:
            columns[name] = Column.of_encoding(encoding)
        except ValueError:
            raise UserError(
                f"{path}: the column {name} is of {encoding}, and rows have columns of a fixed size, such as float32 "
                f"or ndarray:float32:2, of {', '.join(COLUMN_DTYPES)}; write the split again without it"
            ) from None
    layout = RowLayout(index.seq_length, index.dtype, columns)
    if LABEL_MASK in columns and columns[LABEL_MASK] != (mask := label_mask_column(index.seq_length)):
        raise UserError(
            f"{path}: the column {LABEL_MASK} is of {columns[LABEL_MASK].encoding}, and rows of "
            f"seq_length={index.seq_length} have {mask.encoding}; write the split again"
        )
    for shard in shards:
        if _table(shard) != layout.encodings:
            raise UserError(
                f"{path}: the rows of {shard['raw_data']['basename']} have the columns {_in_words(_table(shard))}, and "
                f"those of this split have {_in_words(layout.encodings)}; write the split again"
            )
        if shard["samples"] * layout.least_bytes > shard["raw_data"]["bytes"]:
            raise UserError(
                f"{path}: {shard['raw_data']['basename']} has {shard['raw_data']['bytes']} bytes, which do not hold "
                f"{shard['samples']} rows of seq_length={index.seq_length} with these columns; write the split again"
            )
    return layout


def _table(shard: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


def _in_words(encodings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({encoding})" for name, encoding in encodings.items())


class RowWriter:
    """Writes one split.  Until `finish` returns, the folder has no valid index and no reader takes it for a split."""

    def __init__(
        self,
        folder: Path,
        *,
        seq_length: int,
        vocab_size: int,
        shard_bytes: int,
        compression: str | None,
        label_mask: bool = False,
        extras: Mapping[str, Column] | None = None,
    ) -> None:
        """`label_mask`: each row has one; `extras`: its further columns.

        Raises UserError if `shard_bytes` (size of a raw shard file) does not hold one row, and as `ShardWriter` does.
        """
        self.folder = folder
        columns = {**(extras or {}), **({LABEL_MASK: label_mask_column(seq_length)} if label_mask else {})}
        self._num_labels = 0 if label_mask else None
        self._dtype = id_dtype(vocab_size)
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._layout = RowLayout(seq_length, self._dtype, columns)
        longest_row = seq_length * (np.dtype(self._dtype).itemsize + 4) + 1024  # with every piece of length 1; header
        longest_row += sum(column.num_bytes for column in columns.values())
        if shard_bytes < longest_row:
            raise UserError(
                f"shard_bytes={shard_bytes} does not hold a row of seq_length={seq_length}; set it to {longest_row} "
                "or more (tens of millions are usual)"
            )
        self._writer = ShardWriter(folder, self._layout.table, compression=compression, shard_bytes=shard_bytes)

    def write(
        self,
        ids: np.ndarray,
        doc_lengths: Sequence[int] | np.ndarray,
        *,
        label_mask: np.ndarray | None = None,
        extras: Mapping[str, np.ndarray | np.generic] | None = None,
    ) -> None:
        """Append a row: integer ids `[seq_length]`, the lengths of its pieces, and what the writer's columns are.

        `label_mask` is bool `[seq_length]`; each of `extras` has the type and shape of its column.
        """
        lengths = np.asarray(doc_lengths, np.int32)
        assert ids.shape == (self._seq_length,) and 0 <= ids.min() and ids.max() < self._vocab_size
        assert lengths.min() >= 1 and lengths.sum() == self._seq_length
        columns: dict[str, Any] = dict(extras or {})
        if label_mask is not None:
            assert self._num_labels is not None and label_mask.shape == ids.shape
            columns[LABEL_MASK] = np.packbits(label_mask)
            self._num_labels += int(label_mask.sum() - label_mask[np.cumsum(lengths) - lengths].sum())
        assert columns.keys() == self._layout.columns.keys(), columns.keys()
        for name, column in self._layout.columns.items():
            assert columns[name].dtype == column.dtype and columns[name].shape == column.shape, name
        self._writer.write(self._layout.join(ids, lengths, columns))

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
        path = self.folder / INDEX_NAME
        tree: dict[str, Any] = {"version": VERSION, "shards": self._writer.finish()}
        record = {
            "format_version": FORMAT_VERSION_OF_COLUMNS if self._layout.columns else FORMAT_VERSION,
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
            **({} if self._num_labels is None else {"num_labels": self._num_labels}),
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
