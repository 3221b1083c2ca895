"""Rows of one split by number; those of shards, which are local or reached through a local cache of remote ones.

Nothing damaged is ever read as data: the index has a checksum, every shard's size is checked at open, its whole content
is hashed when it is first touched, and every row is checked against the index.  Each failure is a UserError that names
the file.  There are no background processes and no shared memory, so there is nothing to hang and nothing to clean up.
"""

import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from lfm.data import streaming_shim
from lfm.data.format import HASH, INDEX_NAME, SplitIndex, read_index
from lfm.data.order import row_order
from lfm.errors import UserError


class RowReader(ABC):
    """The rows of one split, however they are stored.  Safe to call from several threads."""

    folder: Path
    index: SplitIndex

    def __len__(self) -> int:
        return self.index.num_rows

    @abstractmethod
    def read(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, list[list[int]]]:
        """Ids, int64 `[len(rows), T]`, and the lengths of the documents in each row (each sums to T).

        Raises UserError naming the file if it is missing, damaged or cannot be fetched in time.
        """

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Rows at the global sample positions `start .. start + count - 1`, int64 `[count]`: no state but `seed`."""
        return row_order(seed, len(self), start, count)

    def num_padding(self, row: int, doc_lengths: Sequence[int]) -> int:
        """How many positions at the end of `row`, which `read` gave with `doc_lengths`, are padding."""
        if self.index.packing == "one_document":
            return len(doc_lengths) - 1
        if self.index.packing == "best_fit":  # no document's piece there is of one id
            return len(doc_lengths) - next((n for n in range(len(doc_lengths), 0, -1) if doc_lengths[n - 1] > 1), 0)
        return self.index.num_padding if row == len(self) - 1 else 0


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    xxh64: str


@dataclass
class _Shard:
    raw: _File
    zip: _File | None
    compression: str | None
    reader: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    verified: bool = False


class ShardReader(RowReader):
    """The rows of the split in `folder`.  Safe to call from several threads, and from several processes on one folder.

    With `remote` (a path or URL of the same split: s3://, gs://, hf://, ...), `folder` is a cache that shards are
    fetched into when first needed; otherwise `folder` must hold all of them.
    """

    def __init__(self, folder: Path | str, *, remote: str | None = None, fetch_timeout_seconds: float = 120.0) -> None:
        """Raises UserError for a missing or damaged index and for a local shard that is missing or of a wrong size."""
        self.folder = Path(folder)
        self._remote = remote
        self._fetch_timeout_seconds = fetch_timeout_seconds
        if remote is not None:
            _fetch_index(remote, self.folder, fetch_timeout_seconds)
        self.index, shards = read_index(self.folder)
        self._shards = [self._open_shard(shard) for shard in shards]
        self._first_rows = np.cumsum([0, *(shard["samples"] for shard in shards[:-1])])
        for shard in self._shards:
            self._check_sizes(shard)

    def read(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, list[list[int]]]:
        ids = torch.empty(len(rows), self.index.seq_length, dtype=torch.int64)
        doc_lengths = []
        for i, row in enumerate(rows):
            row_ids, row_lengths = self._read_row(int(row))
            ids[i] = torch.from_numpy(row_ids)
            doc_lengths.append(row_lengths)
        return ids, doc_lengths

    def _read_row(self, row: int) -> tuple[np.ndarray, list[int]]:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        shard = self._shards[number]
        self._verify(shard)
        try:
            sample = shard.reader.get_item(row - int(self._first_rows[number]))
        except (OSError, ValueError, IndexError) as error:  # the file was whole when it was verified
            raise self._damaged(shard.raw.path, f"changed while in use ({error})") from None
        ids, lengths = sample["ids"].astype(np.int64), sample["doc_lengths"].tolist()
        if min(lengths) < 1 or sum(lengths) != self.index.seq_length:
            what = f"has document lengths in row {row} that do not add up to seq_length={self.index.seq_length}"
            raise self._damaged(shard.raw.path, what)
        if ids.max() >= self.index.vocab_size:
            what = f"has id {ids.max()} in row {row}, past vocab_size={self.index.vocab_size}"
            raise self._damaged(shard.raw.path, what)
        return ids, lengths

    def _open_shard(self, entry: dict[str, Any]) -> _Shard:
        def file(info: dict[str, Any]) -> _File:
            return _File(self.folder / info["basename"], info["bytes"], info["hashes"][HASH])

        zipped = file(entry["zip_data"]) if entry["zip_data"] else None
        reader = streaming_shim.make_shard_reader(self.folder, entry)
        return _Shard(file(entry["raw_data"]), zipped, entry["compression"], reader)

    def _check_sizes(self, shard: _Shard) -> None:
        """Missing and cut files show in a stat, before any training; flipped bytes show in `_verify`."""
        present = False
        for file in (shard.raw, shard.zip):
            if file is not None and file.path.exists():
                present = True
                self._check_size(file, file.path)
        if not present and self._remote is None:
            raise self._damaged((shard.zip or shard.raw).path, "is missing")

    def _verify(self, shard: _Shard) -> None:
        """Make sure that the raw file of `shard` is there and is, byte for byte, what was written."""
        with shard.lock:
            if shard.verified:
                return
            try:
                if shard.raw.path.exists():
                    self._check_content(shard.raw, shard.raw.path)
                elif shard.zip is not None:
                    self._obtain(shard.zip)
                    self._decompress(shard, shard.zip)
                else:
                    self._obtain(shard.raw)
            except OSError as error:
                raise UserError(
                    f"shard {shard.raw.path} cannot be prepared ({error}); check access to and room in {self.folder}"
                ) from None
            shard.verified = True

    def _obtain(self, file: _File) -> None:
        """Check the local file, or fetch it from the remote."""
        if file.path.exists():
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
        data = streaming_shim.decompress(shard.compression, zipped.path.read_bytes())
        temporary = _temporary(shard.raw.path)
        try:
            temporary.write_bytes(data)
            self._check_content(shard.raw, temporary)
            os.replace(temporary, shard.raw.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _check_size(self, file: _File, path: Path) -> None:
        size = path.stat().st_size
        if size != file.num_bytes:
            raise self._damaged(file.path, f"has {size} bytes instead of {file.num_bytes}", fetched=path != file.path)

    def _check_content(self, file: _File, path: Path) -> None:
        """Compare `path`, which is `file` or a temporary copy of it, with what the index says of `file`."""
        self._check_size(file, path)
        digest = xxhash.xxh64()
        with open(path, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != file.xxh64:
            what = f"is damaged: its {HASH} is not the one in {INDEX_NAME}"
            raise self._damaged(file.path, what, fetched=path != file.path)

    def _damaged(self, path: Path, what: str, *, fetched: bool = False) -> UserError:
        if self._remote is None:
            way_out = "restore it from a copy or prepare the data set again with overwrite=true"
        elif fetched:
            way_out = f"it came like that from {self._remote}, so restore it there"
        else:
            way_out = "delete it and it will be fetched again"
        return UserError(f"shard {path} {what}; {way_out}")


def fetch(
    remote: str, local: Path, timeout_seconds: float, *, check: Callable[[Path], None] = lambda fetched: None
) -> None:
    """Copy one remote file to `local`, which appears whole and after `check` of the temporary copy, or not at all.

    Raises UserError naming `remote` if that fails or takes too long.
    """
    temporary = _temporary(local)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            streaming_shim.download(remote, temporary, timeout_seconds)
        except BaseException as error:
            failure.append(error)

    # A daemon thread, because not every downloader heeds its timeout and a dead mount blocks for ever: the process
    # must be able to report the file and exit while the thread still hangs.
    thread = threading.Thread(target=work, daemon=True, name=f"fetch {remote}")
    thread.start()
    thread.join(timeout_seconds)
    try:
        if thread.is_alive():
            raise UserError(
                f"{remote} was not fetched within fetch_timeout_seconds={timeout_seconds:g}; "
                "check the connection or allow more time"
            )
        if failure:
            reason = " ".join(str(failure[0]).split()) or type(failure[0]).__name__
            raise UserError(f"{remote} cannot be fetched ({reason}); check data.remote and the access to it")
        check(temporary)
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch_index(remote: str, folder: Path, timeout_seconds: float) -> None:
    """Bring the remote index into the cache; a cache of another version of the data set is an error."""
    cached = folder / INDEX_NAME

    def check(fetched: Path) -> None:
        if cached.exists() and cached.read_bytes() != fetched.read_bytes():
            raise UserError(f"{folder} caches another data set than {remote}; delete it or choose another data.path")

    fetch(f"{remote}/{INDEX_NAME}", cached, timeout_seconds, check=check)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other thread, process or machine uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
