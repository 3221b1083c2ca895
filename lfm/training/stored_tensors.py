"""The tensors of a checkpoint, read without running anything that its files name.

torch.distributed.checkpoint writes `.metadata`, a pickle of which piece of which tensor lies where, and unpickles it
when it reads.  A pickle may call any function, and the hashes of a manifest do not help: whoever makes a checkpoint
makes both.  Here the pickle is read by names on a list alone, each of which becomes an inert record; what the records
say is checked, and DCP is given metadata made anew from it.

The pieces themselves are torch.load'ed with `weights_only=True` by DCP's reader.  Entries that are no tensors it would
unpickle without, so there are none in the metadata that it is given.
"""

import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    unpickler = _Unpickler(path, data)
    try:
        return _metadata(unpickler.load(), files)
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
    """Stands for an object of the pickle: what it was called with, and its state."""

    kind: str

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, {}

    def __new__(cls, *_: Any) -> "_Record":
        made = super().__new__(cls)
        made.arguments, made.state = (), {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        # Made anew for each file, since a pickle can reach and change what it is given.
        self._records = {key: type(key[1], (_Record,), {"kind": key[1]}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) not in self._records:
            raise _holds_code(self._path, f"{module}.{name}")
        return self._records[module, name]


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
    if len({chunk.offsets for chunk in filled}) != len(filled):
        raise ValueError("two pieces have one place")
    dtype = _state(found["properties"], "TensorProperties", tuple)[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _place(index: Any, info: Any, files: Mapping[str, Mapping[str, Any]]) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    name, (offset, length) = _text(place["relative_path"]), _integers((place["offset"], place["length"]))
    if name not in files:
        raise ValueError(f"{name!r} is no file of the manifest")
    if offset + length > files[name]["bytes"] or place.get("transform_descriptors") is not None:
        raise ValueError(f"a piece is not within {name}")
    return MetadataIndex(_text(key["fqn"]), _size(key["offset"])), _StorageInfo(name, offset, length)


def _state(record: Any, kind: str, state: type = dict) -> Any:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, state):
        raise ValueError(f"there is no {kind} where one must be")
    return record.state


def _size(record: Any) -> torch.Size:
    if not isinstance(record, _Record) or record.kind != "Size" or len(record.arguments) != 1:
        raise ValueError("there is no size where one must be")
    return torch.Size(_integers(record.arguments[0]))


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value


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
