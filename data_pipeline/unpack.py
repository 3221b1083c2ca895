"""Files that may be compressed, read in pieces, of which none is held in memory that is more than text needs."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol, cast

from data_pipeline import extras
from lfm.errors import UserError
from lfm.files import open_file, reason, shown

PACKED = (".gz", ".dz", ".zst", ".xz", ".bz2")
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""

_BLOCK_BYTES = 1 << 19
_XZ_MEMORY_BYTES = 1 << 27
"""Of its largest preset, twice; a file may ask for gigabytes."""


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends so, in capitals or not."""
    return name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def is_packed(path: PurePath) -> bool:
    """Whether its name says that a file is compressed."""
    return path.suffix.lower() in PACKED


@dataclass(frozen=True)
class Limits:
    """What is more than text needs."""

    record_bytes: int
    """Of a document, a line or a row."""
    expansion: int
    """Bytes that a byte of a compressed file becomes, on the whole."""


class Unreadable(UserError):
    """A file that cannot be opened."""


class Damaged(Unreadable):
    """A file that was opened and is not whole."""


class Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def opened(path: Path, limits: Limits) -> Iterator[tuple[Stream, Callable[[], int]]]:
    """A file's content, unpacked if its name ends in one of `PACKED`, and how many of its bytes have been read.

    Raises Unreadable if it cannot be opened, and when it is read Damaged, or UserError if it becomes more than `limits`
    allow.
    """
    try:
        raw = open_file(path)
    except UserError as error:
        raise Unreadable(str(error)) from None
    with raw:
        try:
            yield _unpacked(path, raw, limits), raw.tell
        except DAMAGE as error:
            raise Damaged(f"{shown(path)} is damaged ({reason(error)}); fetch it again, or exclude it") from None


def records(stream: Stream, separator: bytes, limit: int) -> Iterator[bytes | None]:
    """The pieces of a stream between separators; None in place of one of more than `limit` bytes.

    Takes time in proportion to the stream, and memory to `limit`.
    """
    held, overlap, is_too_long = bytearray(), len(separator) - 1, False
    while block := stream.read(_BLOCK_BYTES):
        at, start = 0, max(0, len(held) - overlap)  # a separator may have begun in what is held
        held += block
        while (end := held.find(separator, start)) >= 0:
            yield None if is_too_long or end - at > limit else bytes(held[at:end])
            at = start = end + len(separator)
            is_too_long = False
        del held[:at]
        if len(held) > limit + overlap:
            is_too_long = True
            del held[: len(held) - overlap]
    if held or is_too_long:
        yield None if is_too_long or len(held) > limit else bytes(held)


class _Bounded:
    """A stream that ends with an error when it gives more than `largest` bytes."""

    def __init__(self, stream: Stream, largest: int, error: UserError) -> None:
        self._stream, self._left, self._error = stream, largest, error

    def read(self, size: int, /) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise self._error
        return block


class _Xz(io.RawIOBase):
    """As `lzma.open`, which would give a file all the memory it asks for."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._decoder.eof:  # several streams may follow each other, with zeros between
                rest = self._decoder.unused_data or self._raw.read(_BLOCK_BYTES)
                while rest and not (rest := rest.lstrip(b"\0")):
                    rest = self._raw.read(_BLOCK_BYTES)
                if not rest:
                    return 0
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
            else:
                rest = self._raw.read(_BLOCK_BYTES) if self._decoder.needs_input else b""
                if self._decoder.needs_input and not rest:
                    raise EOFError("it ends before its end marker")
            block = self._decoder.decompress(rest, len(view))
            if block:
                view[: len(block)] = block
                return len(block)


def _unpacked(path: Path, raw: BinaryIO, limits: Limits) -> Stream:
    match path.suffix.lower():
        case ".gz" | ".dz":
            stream = cast(BinaryIO, gzip.open(raw))
        case ".bz2":
            stream = cast(BinaryIO, bz2.open(raw))
        case ".xz":
            stream = cast(BinaryIO, io.BufferedReader(_Xz(raw), _BLOCK_BYTES))
        case ".zst":
            pyarrow = extras.require("pyarrow", extra="datasets", purpose=f"reading {shown(path)}")
            stream = cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20))
        case _:
            return raw
    packed = os.fstat(raw.fileno()).st_size
    error = UserError(
        f"{shown(path)} has {packed:,} bytes and unpacks to more than {limits.expansion} times as many, which no text "
        "does; exclude it, or raise max_expansion"
    )
    return _Bounded(stream, max(limits.record_bytes + 1, limits.expansion * packed), error)
