"""Files of text: finding them, and reading those that are not read whole."""

import glob
import gzip
import io
import os
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from data_pipeline import extras
from data_pipeline.batches import BATCH_BYTES, Batch, InputFile, TextBatch
from data_pipeline.markup import Markup
from lfm.errors import UserError


def matching_paths(patterns: Sequence[str], suffixes: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    """The files that `patterns` lead to; from folders, those with one of `suffixes`.

    Raises UserError for a pattern that leads to none.
    """
    found = []
    for pattern in patterns:
        of_pattern = _matches(pattern, tuple(suffixes), exclude)
        if not of_pattern:
            raise UserError(f"source path {pattern!r} leads to no {' '.join(suffixes)} file; correct it or remove it")
        found += of_pattern
    return found


def checked(
    wanted: Sequence[tuple[Path, Markup]],
    counts: Counter[str],
    seen: set[tuple[int, int]],
    *,
    max_file_bytes: int | None,
    not_utf8: Literal["skip", "latin-1"],
) -> list[InputFile]:
    """Those of `wanted` that are files and not in `seen` (device, inode), which they join; others are counted."""
    files = []
    for path, markup in wanted:
        counts["files_found"] += 1
        try:
            status = path.stat()
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            counts["files_unreadable"] += 1
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            counts["files_repeated"] += 1
            continue
        seen.add(identity)
        if max_file_bytes is not None and status.st_size > max_file_bytes:
            counts["files_too_large"] += 1
        else:
            files.append(InputFile(path, not_utf8, markup, status.st_size, status.st_mtime_ns))
    return files


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's content, unpacked if its name ends in .gz or .zst, and how many of its bytes have been read.

    Raises OSError if it cannot be opened, and UserError if it is damaged.
    """
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            content = cast(BinaryIO, gzip.open(raw))
        elif path.suffix == ".zst":
            pyarrow = extras.require("pyarrow", extra="datasets", purpose=f"reading {path}")
            content = cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20))
        else:
            content = raw
        try:
            yield content, raw.tell
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again, or exclude it") from None


def parquet_batches(source: int, file: InputFile, text_key: str) -> Iterator[Batch]:
    """The rows of a parquet file.  Raises UserError if it is damaged or has no such column of text."""
    parquet = extras.require("pyarrow.parquet", extra="datasets", purpose="kind=parquet")
    pyarrow = extras.require("pyarrow", extra="datasets", purpose="kind=parquet")
    open(file.path, "rb").close()  # what cannot be opened is the caller's to count
    try:
        table = parquet.ParquetFile(file.path)
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{file.path} has no column text_key={text_key!r} (its columns: "
                f"{', '.join(table.schema_arrow.names)}); set text_key to one of them"
            )
        rows = table.metadata.num_rows
        groups = table.iter_batches(batch_size=256, columns=[text_key])
        texts = (text for group in groups for text in group.column(0).to_pylist())
        yield from text_batches(source, texts, str(file.path), bytes_a_text=file.num_bytes / max(1, rows))
    except (pyarrow.ArrowException, OSError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{file.path} is damaged ({words}); fetch it again, or exclude it") from None


def text_batches(source: int, texts: Iterator[Any], origin: str, *, bytes_a_text: float) -> Iterator[Batch]:
    """Texts in batches; what is no text counts as an empty one."""
    group: list[tuple[str, str]] = []
    size = 0
    for number, text in enumerate(texts, start=1):
        text = text if isinstance(text, str) else ""
        group.append((text, f"{origin}:row {number}"))
        size += len(text)
        if size >= BATCH_BYTES:
            yield TextBatch(source, round(len(group) * bytes_a_text), tuple(group))
            group, size = [], 0
    if group:
        yield TextBatch(source, round(len(group) * bytes_a_text), tuple(group))


def _matches(pattern: str, suffixes: tuple[str, ...], exclude: Sequence[str]) -> list[Path]:
    filled = pattern
    for name, key in (("{stdlib}", "stdlib"), ("{site-packages}", "purelib")):
        filled = filled.replace(name, sysconfig.get_path(key))
    filled = os.path.abspath(os.path.expanduser(filled))
    found = []
    for match in [filled] if os.path.exists(filled) else sorted(glob.glob(filled, recursive=True)):
        root = Path(match)
        if not root.is_dir():
            found.append(root)  # named one by one or by a glob: taken whatever its suffix
            continue
        found += [path for path in _walk(root, root, exclude, seen=set()) if path.name.endswith(suffixes)]
    return found


def _walk(folder: Path, root: Path, exclude: Sequence[str], *, seen: set[Path]) -> Iterator[Path]:
    """Files below `folder`, sorted; linked folders are followed, each real folder once, so a loop of links ends."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"source folder {folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        below = entry.relative_to(root).as_posix()
        if entry.is_dir():
            # A pattern that ends in /* and matches the folder matches all that is in it: do not even look.
            if not any(pattern.endswith("/*") and fnmatch(below + "/", pattern) for pattern in exclude):
                yield from _walk(entry, root, exclude, seen=seen)
        elif not any(fnmatch(below, pattern) for pattern in exclude):
            yield entry
