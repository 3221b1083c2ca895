"""Rows of one split by number; those of shards, which are local or reached through a local cache of remote ones.

Nothing damaged is ever read as data: the index has a checksum, every shard's size is checked at open, its whole content
is hashed when it is first touched and again when the file is another than it was, and every row is checked against the
index.  Each failure is a UserError that names the file.  There are no background processes and no shared memory, so
there is nothing to hang and nothing to clean up.
"""

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from lfm.data.batch import Batch
from lfm.data.cache import Cache, fetch, remove_abandoned, temporary_name
from lfm.data.format import INDEX_NAME, LABEL_MASK, SplitIndex, read_index, read_layout
from lfm.data.mds import HASH, decompressed
from lfm.data.order import epoch_permutation, row_order
from lfm.errors import UserError
from lfm.files import exists, file_size, open_file, read_file

_OPEN_FILES = 64
_OPEN_FILES_OF_A_LIMITED_CACHE = 4
"""An open file keeps its room on the disk even after it was removed."""
_ATTEMPTS_TO_OPEN = 5


class RowReader(ABC):
    """The rows of one split, however they are stored.  Safe to call from several threads."""

    folder: Path
    index: SplitIndex
    columns: Mapping[str, str] = {}
    """What rows have beside ids and lengths: MDS's name of its type, by its own.  `label_mask` is `Batch.label_mask`,
    the others are `Batch.extras`."""

    def __len__(self) -> int:
        return self.index.num_rows

    @abstractmethod
    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Raises UserError naming the file if it is missing, damaged or cannot be fetched in time."""

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Rows at the global sample positions `start .. start + count - 1`, int64 `[count]`: no state but `seed`."""
        return row_order(seed, len(self), start, count, self._permutation)

    def identity(self, position: int) -> str:
        """What a checkpoint remembers of the rows and the order in which the first `position` of them come."""
        assert position >= 0
        return self.index.checksum

    def num_padding(self, row: int, doc_lengths: Sequence[int]) -> int:
        """How many positions at the end of `row`, which `read` gave with `doc_lengths`, are padding."""
        if self.index.packing == "one_document":
            return len(doc_lengths) - 1
        if self.index.packing == "best_fit":  # no document's piece there is of one id
            return len(doc_lengths) - next((n for n in range(len(doc_lengths), 0, -1) if doc_lengths[n - 1] > 1), 0)
        return self.index.num_padding if row == len(self) - 1 else 0

    @cached_property
    def _permutation(self) -> Any:
        return lru_cache(maxsize=2)(epoch_permutation)  # a step may need the end of one epoch and the next


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    xxh64: str


@dataclass
class _Shard:
    number: int
    raw: _File
    zip: _File | None
    compression: str | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    verified: tuple[int, ...] | None = None
    """`_OpenFile.identity` of the raw file when its hash was found right."""

    @property
    def files(self) -> list[_File]:
        return [self.raw, self.zip] if self.zip is not None else [self.raw]


class _OpenFile:
    """A shard's raw file, closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        file = open_file(path)
        self.descriptor = file.fileno()
        weakref.finalize(self, file.close)
        self.ends: np.ndarray | None = None
        """Where each row begins and the last one ends, int64; known once the content is."""

    @property
    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor)


class ShardReader(RowReader):
    """The rows of the split in `folder`.  Safe to call from several threads, and from several processes on one folder.

    With `remote` (a path or URL of the same split: s3://, https://, hf://, ...), `folder` is a cache that shards are
    fetched into when first needed; otherwise `folder` must hold all of them.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        remote: str | None = None,
        fetch_timeout_seconds: float = 120.0,
        cache_limit_bytes: int | None = None,
    ) -> None:
        """Raises UserError for a missing or damaged index and for a local shard that is missing or of a wrong size."""
        self.folder = Path(folder)
        self._remote = remote
        self._fetch_timeout_seconds = fetch_timeout_seconds
        self._cache = None
        remove_abandoned(self.folder)
        if remote is not None:
            _fetch_index(remote, self.folder, fetch_timeout_seconds)
            try:
                self._cache = Cache(self.folder, timeout_seconds=fetch_timeout_seconds, limit_bytes=cache_limit_bytes)
            except OSError as error:
                raise UserError(f"{self.folder} cannot be a cache ({error}); choose another data.path") from None
        self.index, shards = read_index(self.folder)
        self._layout = read_layout(self.folder, self.index, shards)
        self.columns = {name: column.encoding for name, column in self._layout.columns.items()}
        self._shards = [self._shard(number, entry) for number, entry in enumerate(shards)]
        self._first_rows = np.cumsum([0, *(shard["samples"] for shard in shards[:-1])]).tolist()
        self._num_rows = [shard["samples"] for shard in shards]
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._max_open = _OPEN_FILES if cache_limit_bytes is None else _OPEN_FILES_OF_A_LIMITED_CACHE
        self._lock = threading.Lock()
        for shard in self._shards:
            self._check_sizes(shard)
        largest = max(sum(file.num_bytes for file in shard.files) for shard in self._shards)
        if cache_limit_bytes is not None and cache_limit_bytes < 2 * largest:
            raise UserError(
                f"data.cache_limit_bytes={cache_limit_bytes} does not hold two shards of {remote or folder}, of "
                f"up to {largest} bytes each; set it to {2 * largest} or more"
            )

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        ids = torch.empty(len(rows), self.index.seq_length, dtype=torch.int64)
        table = ids.numpy()
        columns = {name: np.empty((len(rows), *x.shape), x.dtype) for name, x in self._layout.columns.items()}
        lengths = []
        for i, row in enumerate(rows):
            row_lengths, found = self._read_row(int(row), table[i])
            lengths.append(row_lengths)
            for name, column in columns.items():
                column[i] = found[name]
        packed = columns.pop(LABEL_MASK, None)
        mask = None
        if packed is not None:
            mask = torch.from_numpy(np.unpackbits(packed, axis=1, count=self.index.seq_length).astype(bool))
        return Batch(ids, lengths, mask, {name: torch.from_numpy(column) for name, column in columns.items()})

    def _read_row(self, row: int, ids: np.ndarray) -> tuple[list[int], dict[str, np.ndarray]]:
        """Put the ids of `row` into `ids`; returns its document lengths and its other columns."""
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        number = bisect_right(self._first_rows, row) - 1
        shard = self._shards[number]
        file = self._whole_file(shard)
        assert file.ends is not None
        begin, end = file.ends[row - self._first_rows[number] :][:2].tolist()
        try:
            # Not a memory map: a file that is cut while it is mapped kills the process instead of raising.
            stored, doc_lengths, columns = self._layout.split(os.pread(file.descriptor, end - begin, begin))
        except (OSError, ValueError) as error:
            raise self._damaged(shard.raw.path, f"has no readable row {row} ({error})") from None
        lengths = doc_lengths.tolist()
        if not lengths or min(lengths) < 1 or sum(lengths) != self.index.seq_length:
            what = f"has document lengths in row {row} that do not add up to seq_length={self.index.seq_length}"
            raise self._damaged(shard.raw.path, what)
        largest = stored.max()
        if largest >= self.index.vocab_size:
            what = f"has id {largest} in row {row}, past vocab_size={self.index.vocab_size}"
            raise self._damaged(shard.raw.path, what)
        ids[:] = stored
        return lengths, columns

    def _shard(self, number: int, entry: dict[str, Any]) -> _Shard:
        def file(info: dict[str, Any]) -> _File:
            return _File(self.folder / info["basename"], info["bytes"], info["hashes"][HASH])

        zipped = file(entry["zip_data"]) if entry["zip_data"] else None
        return _Shard(number, file(entry["raw_data"]), zipped, entry["compression"])

    def _check_sizes(self, shard: _Shard) -> None:
        """Missing and cut files show in a stat, before any training; flipped bytes show in `_whole_file`."""
        present = False
        for file in shard.files:
            if exists(file.path):
                present = True
                try:
                    self._check_size(file, file_size(file.path))
                except UserError as error:
                    if not isinstance(error.__cause__, FileNotFoundError) or self._remote is None:
                        raise  # not removed from the cache by another process just now
        if not present and self._remote is None:
            raise self._damaged((shard.zip or shard.raw).path, "is missing")

    def _whole_file(self, shard: _Shard) -> _OpenFile:
        """The raw file of `shard`, which is there and is, byte for byte, what was written."""
        with self._lock:
            file = self._open.get(shard.number)
            if file is not None:
                self._open.move_to_end(shard.number)
        if file is not None and shard.verified == _identity(status := file.status) and self._is_in_place(status):
            return file
        with shard.lock:
            try:
                file = self._verified(shard)
            except OSError as error:
                raise UserError(
                    f"shard {shard.raw.path} cannot be prepared ({error}); check access to and room in {self.folder}"
                ) from None
            with self._lock:
                self._open[shard.number] = file
                self._open.move_to_end(shard.number)
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            return file

    def _is_in_place(self, status: os.stat_result) -> bool:
        """Removing a file is no damage to one who has it open, and in a cache it is only to make room."""
        return self._remote is not None or status.st_nlink > 0

    def _verified(self, shard: _Shard) -> _OpenFile:
        file = self._opened(shard)
        identity = _identity(file.status)
        if shard.verified != identity:
            since = "changed while in use and " if shard.verified else ""
            self._check_content(shard.raw, file.descriptor, since=since)
        shard.verified = identity
        num_rows = self._num_rows[shard.number]
        file.ends = np.frombuffer(os.pread(file.descriptor, 4 * (num_rows + 1), 4), "<u4").astype(np.int64)
        return file

    def _opened(self, shard: _Shard) -> _OpenFile:
        for _ in range(_ATTEMPTS_TO_OPEN):
            try:
                if not exists(shard.raw.path):
                    self._make(shard)
                file = _OpenFile(shard.raw.path)
            except UserError as error:
                if self._cache is None or not isinstance(error.__cause__, FileNotFoundError):
                    raise
                continue  # another process needed the room
            if self._cache is not None:
                # For `make_room`; when the file was last written to stays known.
                os.utime(file.descriptor, ns=(time.time_ns(), file.status.st_mtime_ns))
            return file
        raise UserError(
            f"shard {shard.raw.path} is removed by other processes as fast as it is fetched; "
            "raise data.cache_limit_bytes"
        )

    def _make(self, shard: _Shard) -> None:
        """Fetch or decompress the raw file, or wait for another process of the node that does."""
        if shard.verified and self._remote is None and shard.zip is None:
            raise self._damaged(shard.raw.path, "changed while in use and is missing")
        with self._cache.alone(shard.number) if self._cache is not None else nullcontext():
            if exists(shard.raw.path):
                return
            if self._cache is not None:
                need = sum(file.num_bytes for file in shard.files if not file.path.exists())
                others = [[file.path for file in other.files] for other in self._shards if other is not shard]
                self._cache.make_room(need, others)
            self._obtain(shard.zip or shard.raw)
            if shard.zip is not None:
                self._decompress(shard, shard.zip)

    def _obtain(self, file: _File) -> None:
        """Check the local file, or fetch it from the remote."""
        if exists(file.path):
            self._check_content(file, file.path)
        elif self._remote is not None:
            fetch(
                f"{self._remote}/{file.path.name}",
                file.path,
                self._fetch_timeout_seconds,
                check=lambda fetched: self._check_content(file, fetched),
            )
        else:
            raise self._damaged(file.path, "is missing")

    def _decompress(self, shard: _Shard, zipped: _File) -> None:
        assert shard.compression is not None
        data = decompressed(zipped.path, shard.compression, shard.raw.num_bytes)
        temporary = temporary_name(shard.raw.path)
        try:
            temporary.write_bytes(data)
            self._check_content(shard.raw, temporary)
            os.replace(temporary, shard.raw.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _check_size(self, file: _File, size: int, *, since: str = "", fetched: bool = False) -> None:
        if size != file.num_bytes:
            raise self._damaged(file.path, f"{since}has {size} bytes instead of {file.num_bytes}", fetched=fetched)

    def _check_content(self, file: _File, path: Path | int, *, since: str = "") -> None:
        """Compare `path`, which is `file`, open or not, or a temporary copy, with what the index says of `file`."""
        fetched = isinstance(path, Path) and path != file.path
        size = os.fstat(path).st_size if isinstance(path, int) else file_size(path)
        self._check_size(file, size, since=since, fetched=fetched)
        if hash_file(path) != file.xxh64:
            what = f"{since}is damaged: its {HASH} is not the one in {INDEX_NAME}"
            raise self._damaged(file.path, what, fetched=fetched)

    def _damaged(self, path: Path, what: str, *, fetched: bool = False) -> UserError:
        if self._remote is None:
            way_out = "restore it from a copy or prepare the data set again with overwrite=true"
        elif fetched:
            way_out = f"it came like that from {self._remote}, so restore it there"
        else:
            way_out = "delete it and it will be fetched again"
        return UserError(f"shard {path} {what}; {way_out}")


def hash_file(path: Path | int) -> str:
    """xxh64 of the content of a path or descriptor."""
    digest = xxhash.xxh64()
    with open(path, "rb", closefd=False) if isinstance(path, int) else open_file(path) as opened:
        opened.seek(0)
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Changes when the file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _fetch_index(remote: str, folder: Path, timeout_seconds: float) -> None:
    """Bring the remote index into the cache; a cache of another version of the data set is an error."""
    cached = folder / INDEX_NAME

    def check(fetched: Path) -> None:
        if exists(cached) and read_file(cached) != read_file(fetched):
            raise UserError(
                f"{folder} caches another data set than {remote}, or its {INDEX_NAME} is damaged; delete the folder or "
                "choose another data.path"
            )

    fetch(f"{remote}/{INDEX_NAME}", cached, timeout_seconds, check=check)
