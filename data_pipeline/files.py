"""Files of text: finding them, and reading those of columns."""

import glob
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from data_pipeline import extras, remote
from data_pipeline.batches import BATCH_BYTES, Batch, InputFile, Left, TextBatch
from data_pipeline.markup import Markup
from data_pipeline.unpack import Limits, has_suffix, opened
from lfm.errors import UserError
from lfm.files import exists, expanded, listed, shown

_BATCH_ROWS = 1 << 14


def matching_paths(patterns: Sequence[str], suffixes: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    """The files that `patterns` lead to; from folders, those with one of `suffixes`.

    Raises UserError for a pattern that leads to none.
    """
    found = []
    for pattern in patterns:
        of_pattern = matches(pattern, tuple(suffixes), exclude)
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
    limits: Limits,
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
            counts["files_unreadable" if status is None else "files_not_regular"] += 1
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            counts["files_repeated"] += 1
            continue
        seen.add(identity)
        if max_file_bytes is not None and status.st_size > max_file_bytes:
            counts["files_too_large"] += 1
        else:
            files.append(InputFile(path, not_utf8, markup, status.st_size, status.st_mtime_ns, limits))
    return files


def parquet_batches(source: int, file: InputFile, text_key: str) -> Iterator[Batch]:
    """The rows of a parquet file.  Raises UserError if it is damaged or has no such column of text."""
    parquet = extras.require("pyarrow.parquet", extra="datasets", purpose="kind=parquet")
    pyarrow = extras.require("pyarrow", extra="datasets", purpose="kind=parquet")
    name = shown(file.path)
    with opened(file.path, file.limits):
        pass  # what cannot be opened is the caller's to count
    try:
        table = parquet.ParquetFile(file.path)
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise UserError(
                f"{name} has no column text_key={text_key!r} (its columns: {shown(', '.join(schema.names))}); "
                "set text_key to one of them"
            )
        kind = schema.field(text_key).type
        if not _holds_text(kind):
            raise UserError(
                f"{name} has the type {shown(str(kind))} in column text_key={text_key!r}, which takes text (string, or "
                "binary in UTF-8); set text_key to another column, or exclude the file"
            )
        rows = table.metadata.num_rows
        size = max(1, BATCH_BYTES // max(1, _column_bytes(table.metadata, text_key) // max(1, rows)))
        groups = table.iter_batches(batch_size=min(256, size), columns=[text_key])
        values = (value for group in groups for value in _values(group.column(0), file.limits.record_bytes))
        yield from text_batches(
            source, values, name, column=text_key, limits=file.limits, bytes_a_text=file.num_bytes / max(1, rows)
        )
    except (pyarrow.ArrowException, OSError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{name} is damaged ({words}); fetch it again, or exclude it") from None


def text_batches(
    source: int, values: Iterable[Any], origin: str, *, column: str, limits: Limits, bytes_a_text: float
) -> Iterator[Batch]:
    """The values of a column, which should be texts, in batches."""
    group: list[tuple[Any, str]] = []
    size, first = 0, True
    for number, value in enumerate(values, start=1):
        if isinstance(value, str | bytes):
            length = len(value.encode(errors="replace") if isinstance(value, str) and not value.isascii() else value)
            size += length
            if length > limits.record_bytes:
                value = Left.TOO_LONG
        group.append((value, f"{origin}:row {number}"))
        if size >= BATCH_BYTES or len(group) == _BATCH_ROWS:
            name = f"text_key={column!r}" if first else None
            yield TextBatch(source, round(len(group) * bytes_a_text), tuple(group), column=name)
            group, size, first = [], 0, False
    if group:
        name = f"text_key={column!r}" if first else None
        yield TextBatch(source, round(len(group) * bytes_a_text), tuple(group), column=name)


def _holds_text(kind: Any) -> bool:
    kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    return re.fullmatch(r"(large_)?(string|binary)(_view)?|fixed_size_binary\[\d+\]|null", str(kind)) is not None


def _column_bytes(metadata: Any, name: str) -> int:
    """Size of a column before compression."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _values(column: Any, limit: int) -> Iterator[Any]:
    """As Python's, but for those that are too long, of which no copy is made."""
    if column.nbytes <= limit:
        yield from column.to_pylist()
        return
    overhead = 16  # of a slice of one value, whose bytes alone count
    for i in range(len(column)):
        is_too_long = not hasattr(column, "dictionary") and column[i : i + 1].nbytes > limit + overhead
        yield Left.TOO_LONG if is_too_long else column[i].as_py()


def matches(pattern: str, suffixes: tuple[str, ...], exclude: Sequence[str]) -> list[Path]:
    """The files that a path, glob or URL leads to; from folders, those with one of `suffixes`.  May be none."""
    if "://" in pattern:
        return remote.fetched(pattern, suffixes, exclude)
    filled = pattern
    for name, key in (("{stdlib}", "stdlib"), ("{site-packages}", "purelib")):
        filled = filled.replace(name, sysconfig.get_path(key))
    whole = expanded(filled).absolute()
    is_named = exists(whole)
    if is_named and not (whole.is_file() or whole.is_dir() or whole.is_symlink()):
        raise UserError(f"source path {shown(filled)} is no regular file; put one there, or pipe it in with kind=stdin")
    found = []
    for match in [os.path.abspath(whole)] if is_named else sorted(glob.glob(os.path.abspath(whole), recursive=True)):
        root = Path(match)
        if not os.path.isdir(root):
            found.append(root)  # named one by one or by a glob: taken whatever its suffix
            continue
        found += [path for path in _walk(root, exclude) if has_suffix(path.name, suffixes)]
    return found


def other_names(folder: Path, suffixes: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Of the files in a folder that `matches` leaves out for their names, the paths below it."""
    return [
        path.relative_to(folder).as_posix() for path in _walk(folder, exclude) if not has_suffix(path.name, suffixes)
    ]


def _walk(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Files below `root`, sorted; linked folders are followed, each real folder once, so a loop of links ends."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]  # the next one last, and no recursion: folders may be deeper than it goes
    while waiting:
        entry = waiting.pop()
        if entry is not root:
            below = entry.relative_to(root).as_posix()
            if not os.path.isdir(entry):
                if not any(fnmatch(below, pattern) for pattern in exclude):
                    yield entry
                continue
            # A pattern that ends in /* and matches the folder matches all that is in it: do not even look.
            if any(pattern.endswith("/*") and fnmatch(below + "/", pattern) for pattern in exclude):
                continue
        status = os.stat(entry)
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            waiting += reversed(listed(entry))
