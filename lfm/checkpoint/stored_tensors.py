"""The tensors of a checkpoint, read without running anything that its files name.

torch.distributed.checkpoint writes `.metadata`, a pickle of which piece of which tensor lies where, and unpickles it
when it reads.  A pickle may call any function, and the hashes of a manifest do not help: whoever makes a checkpoint
makes both.  Here its instructions are read one by one, those on a list alone, and names on a list alone become inert
records; what the records say is checked, and DCP is given metadata made anew from it.

The pieces themselves are torch.load'ed with `weights_only=True` by DCP's reader, after a look at whether they describe
one tensor and nothing that grows.  Entries that are no tensors it would unpickle without, so there are none in the
metadata that it is given.
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lfm.errors import UserError
from lfm.files import open_file, read_file, reason, shown

T = TypeVar("T")

METADATA_NAME = ".metadata"
_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    # Python 3.11.0 to 3.11.3 writes a member of an enumeration as getattr(class, name): a record as all others here.
    ("builtins", "getattr"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64"}


def read_metadata(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """Which piece of which tensor lies where in `files`, the manifest's name -> size and hash.

    Raises UserError, and runs nothing, for a file that names anything else than the metadata of tensors do, or whose
    pieces are not in `files` or do not make up their tensors.
    """
    path = checkpoint / METADATA_NAME
    data = read_file(path)
    try:
        return _metadata(_parsed(path, data), files)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle, or one of something else, leads to
        raise UserError(
            f"checkpoint file {shown(path)} does not describe tensors ({reason(error)}); use another checkpoint"
        ) from error


def load(checkpoint: Path, metadata: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (key -> tensor) in place; of a DTensor, this rank's shard.  Not collective.  Raises UserError."""
    for key, target in targets.items():
        stored = metadata.state_dict_metadata.get(key)
        if stored is None:
            missing = sorted(targets.keys() - metadata.state_dict_metadata.keys())
            raise UserError(f"checkpoint {checkpoint} lacks {missing[0]} (and {len(missing) - 1} more)")
        assert isinstance(stored, TensorStorageMetadata)
        if stored.size != target.size():
            raise UserError(
                f"{key} of checkpoint {checkpoint} has shape {list(stored.size)}, not {list(target.size())}"
            )
    reader = _Reader(checkpoint, metadata)
    try:
        dcp_load(dict(targets), storage_reader=reader, no_dist=True)
    except CheckpointException as failed:
        error = next(iter(failed.failures.values()))[0]
        if isinstance(error, UserError):
            raise error from None
        if not isinstance(error, Exception) or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise error from None
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise _holds_code(reader.last, "something that is no tensor") from error
        raise UserError(
            f"checkpoint file {shown(reader.last)} cannot be read as tensors ({reason(error).splitlines()[0]}); "
            "use another checkpoint"
        ) from error


class _Record:
    """Stands for an object of the pickle, or for the class of one: what it would be made with, and its state."""

    def __init__(self, kind: str, arguments: Any = None) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_WITH_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _parsed(path: Path, data: bytes) -> Any:
    """What the pickle `data` describes, with records in place of objects.

    Those instructions of pickles are carried out here that metadata consists of.  The pickle module's other ones can
    fill the memory or the C stack from a few bytes, and so can keys whose hashing does not end.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []

    def above(height: int) -> list[Any]:
        if not 0 <= height <= len(stack):
            raise ValueError("it takes more than there is")
        taken = stack[height:]
        del stack[height:]
        return taken

    argument: Any
    for instruction, argument, _ in pickletools.genops(data):
        name = instruction.name
        if name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _WITH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(above(len(stack) - _TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(above(marks.pop())))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            values = above(marks.pop() if name == "APPENDS" else len(stack) - 1)
            _of(list, stack[-1]).extend(values)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEM", "SETITEMS"):
            pairs = above(marks.pop() if name == "SETITEMS" else len(stack) - 2)
            keys = pairs[::2]
            if not all(isinstance(key, (str, _Record)) for key in keys):
                raise ValueError("a key is no name")
            _of(dict, stack[-1]).update(zip(keys, pairs[1::2], strict=True))
        elif name in ("STACK_GLOBAL", "GLOBAL", "INST"):
            stack.append(_named(path, *(above(len(stack) - 2) if argument is None else argument.split(" ", 1))))
        elif name in ("NEWOBJ", "REDUCE"):
            made_by, arguments = above(len(stack) - 2)
            stack.append(_Record(_of(_Record, made_by).kind, arguments))
        elif name == "BUILD":
            (state,) = above(len(stack) - 1)
            _of(_Record, stack[-1]).state = state
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"no metadata has a {name}")
    (root,) = stack
    return root


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"there is no {kind.__name__.strip('_').lower()} where one must be")
    return value


def _named(path: Path, module: Any, name: Any) -> Any:
    module, name = _text(module), _text(name)
    if module == "torch" and name in _DTYPES:
        return getattr(torch, name)
    if (module, name) not in _RECORDS:
        raise _holds_code(path, f"{module}.{name}")
    return _Record(name)


def _holds_code(path: Path, what: str) -> UserError:
    return UserError(
        f"checkpoint file {shown(path)} names {shown(Path(what))}, code that lfm does not run; "
        "use a checkpoint that lfm wrote"
    )


def _metadata(root: Any, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    found = _state(root, "Metadata")
    tensors = {_text(key): _tensor(record) for key, record in found["state_dict_metadata"].items()}
    places = dict(_place(index, info, files) for index, info in found["storage_data"].items())
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            if math.prod(chunk.sizes) and MetadataIndex(key, chunk.offsets) not in places:
                raise ValueError(f"a piece of {key} is in no file")
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())  # type: ignore[arg-type]


def _tensor(record: Any) -> TensorStorageMetadata:
    found = _state(record, "TensorStorageMetadata")
    size = _size(found["size"])
    parts = [_state(chunk, "ChunkStorageMetadata") for chunk in found["chunks"]]
    chunks = [ChunkStorageMetadata(_size(part["offsets"]), _size(part["sizes"])) for part in parts]
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    for chunk in chunks:
        ends = [first + length for first, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > length for end, length in zip(ends, size, strict=True)):
            raise ValueError("a piece is not within its tensor")
    # What no piece fills would keep the memory's old content.
    if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(size):
        raise ValueError("pieces do not make up their tensor")
    if _overlap(filled):
        raise ValueError("two pieces have one place")
    dtype = _state(found["properties"], "TensorProperties", tuple)[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _overlap(pieces: list[ChunkStorageMetadata]) -> bool:
    """Whether two of them have an element in common; each is compared with those alone that it may meet."""
    num_axes = len(pieces[0].offsets) if pieces else 0
    if num_axes == 0:
        return len(pieces) > 1
    along = max(range(num_axes), key=lambda axis: len({piece.offsets[axis] for piece in pieces}))
    pieces = sorted(pieces, key=lambda piece: piece.offsets[along])
    for i, piece in enumerate(pieces):
        for other in islice(pieces, i + 1, None):
            if other.offsets[along] >= piece.offsets[along] + piece.sizes[along]:
                break
            sides = zip(piece.offsets, piece.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + size_of_b and b < a + size_of_a for a, size_of_a, b, size_of_b in sides):
                return True
    return False


def _place(index: Any, info: Any, files: Mapping[str, Mapping[str, Any]]) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    name, (offset, length) = _text(place["relative_path"]), _integers((place["offset"], place["length"]))
    if name not in files:
        raise ValueError(f"{shown(name)} is no file of the manifest")
    if offset + length > files[name]["bytes"] or place.get("transform_descriptors") is not None:
        raise ValueError(f"a piece is not within {name}")
    return MetadataIndex(_text(key["fqn"]), _size(key["offset"])), _StorageInfo(name, offset, length)


def _state(record: Any, kind: str, state: type = dict) -> Any:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, state):
        raise ValueError(f"there is no {kind} where one must be")
    return record.state


def _size(record: Any) -> torch.Size:
    if not isinstance(record, _Record) or record.kind != "Size" or not record.arguments:
        raise ValueError("there is no size where one must be")
    return torch.Size(_integers(*record.arguments))


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError("there are no sizes where some must be")
    return values


def _text(value: Any) -> str:
    return _of(str, value)


class _RegularFiles(FileSystem):
    """Opens no FIFO, device or folder, and remembers which file was opened last."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.last = folder

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "rb"
        self.last = Path(path)
        with open_file(self.last) as stream:
            yield stream


class _Reader(FileSystemReader):
    """DCP's reader, given its metadata instead of unpickling it."""

    def __init__(self, checkpoint: Path, metadata: Metadata) -> None:
        super().__init__(checkpoint)
        self._files = self.fs = _RegularFiles(checkpoint)
        self._found = metadata

    @property
    def last(self) -> Path:
        """The file that was read last."""
        return self._files.last

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._found

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        _check_piece(_Piece(file, sinfo.offset, sinfo.length), sinfo.length)
        return super()._slice_file(file, sinfo)


_OF_A_TENSOR = {
    *("PROTO", "STOP", "GLOBAL", "MARK", "REDUCE", "BINPERSID", "BINPUT", "BINUNICODE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "NEWFALSE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
"""Instructions of the pickle beside a tensor's numbers; none refers to something before, so that nothing grows."""
_OF_A_TENSOR_BYTES = 4096


class _Piece(io.RawIOBase):
    """A part of an open file, as a file that can be sought from its end, as DCP's own view cannot."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = file.fileno(), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._offset + self._at)
        self._at += count
        return count


def _check_piece(piece: _Piece, length: int) -> None:
    """Raise ValueError for a piece of `length` bytes that torch.load would make more of, or that is no tensor's."""
    try:
        with zipfile.ZipFile(piece) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > length:
                raise ValueError(f"a piece of {length} bytes unpacks to {unpacked}")
            (described,) = (entry for entry in entries if entry.filename.endswith("data.pkl"))
            if described.file_size > _OF_A_TENSOR_BYTES:
                raise ValueError(f"a piece takes {described.file_size} bytes to describe one tensor")
            pickled = archive.read(described)
    except zipfile.BadZipFile:
        raise ValueError("a piece is no archive of torch.save") from None
    found = {instruction.name for instruction, _, _ in pickletools.genops(pickled)}
    if not found <= _OF_A_TENSOR:
        raise ValueError(f"no tensor has a {min(found - _OF_A_TENSOR)}")
