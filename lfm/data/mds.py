"""Shards of MDS, the format of mosaicml-streaming, byte for byte as its own writer makes them.

    uint32               number of rows
    uint32 [rows + 1]    where in the file each row begins, and where the last one ends
    JSON                 how the shard is made: names, encodings and sizes of its columns, ...
    bytes                the rows (`RowLayout` in lfm/data/format.py)

A shard may lie compressed as a whole.  Its compression is named as MDS does, such as `zstd` or `gz:9`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cramjam
import numpy as np
import xxhash

from lfm.errors import UserError
from lfm.files import exists, listed, read_file, shown

HASH = "xxh64"
VERSION = 2
"""Of index.json."""

_DECOMPRESS_INTO = {
    "zstd": cramjam.zstd.decompress_into,
    "gz": cramjam.gzip.decompress_into,
    "bz2": cramjam.bzip2.decompress_into,
    "br": cramjam.brotli.decompress_into,
    "snappy": cramjam.snappy.decompress_raw_into,
}
"""Each ends with an error where the buffer ends before the content."""
_ZSTD_LEVEL = 3
LARGEST_SHARD = 2**32 - 1
"""Rows are found by uint32."""


class ShardWriter:
    """Writes rows into the shards of an absent or empty folder, one file after the other."""

    def __init__(
        self, folder: Path, columns: Mapping[str, tuple[str, int | None]], *, compression: str | None, shard_bytes: int
    ) -> None:
        """`columns`: encoding by name, and bytes where all rows have as many; `shard_bytes`: at most, of a raw file.

        Raises UserError for a folder that is not empty, too large a `shard_bytes` and a compression that is not zstd.
        """
        if exists(folder) and listed(folder):
            raise UserError(f"{shown(folder)} is not empty; write shards into another folder")
        if not 0 < shard_bytes <= LARGEST_SHARD:
            raise UserError(f"shard_bytes={shard_bytes} is past what MDS can hold; set it to {LARGEST_SHARD} or less")
        if compression not in (None, "zstd"):
            raise UserError(f"compression={compression} is not written; choose zstd or null")
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(columns)
        self._folder, self._shard_bytes = folder, shard_bytes
        self._made: dict[str, Any] = {
            "version": VERSION,
            "format": "mds",
            "compression": compression,
            "hashes": [HASH],
            "size_limit": shard_bytes,
            "column_names": names,
            "column_encodings": [columns[name][0] for name in names],
            "column_sizes": [columns[name][1] for name in names],
        }
        self._header = json.dumps(self._made, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        self._rows: list[bytes] = []
        self._num_bytes = 4 + 4 + len(self._header)  # the count, the end of the last row

    def write(self, row: bytes) -> None:
        """Append a row."""
        if self._rows and self._num_bytes + len(row) + 4 > self._shard_bytes:
            self._write_shard()
        self._rows.append(row)
        self._num_bytes += len(row) + 4

    def finish(self) -> list[dict[str, Any]]:
        """Write the last shard.  Returns what index.json says of each; index.json is the caller's to write."""
        if self._rows:
            self._write_shard()
        return self._shards

    def _write_shard(self) -> None:
        start = 4 + 4 * (len(self._rows) + 1) + len(self._header)
        places = start + np.cumsum([0, *map(len, self._rows)])
        table = np.array([len(self._rows), *places], "<u4").tobytes()
        raw = b"".join((table, self._header, *self._rows))
        name = f"shard.{len(self._shards):05}.mds"
        shard = {"samples": len(self._rows), "raw_data": _record(name, raw), "zip_data": None, **self._made}
        if self._made["compression"]:
            name += ".zstd"
            raw = bytes(cramjam.zstd.compress(raw, _ZSTD_LEVEL))
            shard["zip_data"] = _record(name, raw)
        (self._folder / name).write_bytes(raw)
        self._shards.append(shard)
        self._begin()


def _record(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "hashes": {HASH: xxhash.xxh64(data).hexdigest()}}


def decompressed(path: Path, compression: str, num_bytes: int) -> bytearray:
    """The raw content of a compressed shard, of `num_bytes` at most: no more than that is ever unpacked.

    Raises UserError naming the file if it cannot be had.
    """
    decompress_into = _DECOMPRESS_INTO.get(compression.partition(":")[0])
    if decompress_into is None:
        known = ", ".join(_DECOMPRESS_INTO)
        raise UserError(
            f"shard {shown(path)} has compression={shown(compression)}; only {known} can be read; write it anew"
        )
    data = read_file(path)
    try:
        content = bytearray(num_bytes)
        del content[decompress_into(data, content) :]
    except (cramjam.DecompressionError, MemoryError) as error:
        raise UserError(
            f"shard {shown(path)} is no {shown(compression)} of {num_bytes} bytes ({error or 'out of memory'}); "
            "write it anew"
        ) from None
    return content
