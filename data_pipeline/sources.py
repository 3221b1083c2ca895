"""Where text comes from: the kinds of sources in a config, and their documents in batches, in a fixed order."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

from data_pipeline import debian, files, hub
from data_pipeline.batches import BATCH_BYTES, BATCH_FILES, Batch, FileBatch, InputFile, LineBatch, TextBatch
from data_pipeline.clean import CleanConfig
from data_pipeline.markup import Markup
from lfm.config import Bytes, Config
from lfm.errors import UserError

_SUFFIXES = {
    "text": (".txt", ".md", ".rst"),
    "code": (".py",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
}
_MAX_FILE_BYTES = {"code": 200_000}


class _Source(Config):
    name: str | None = None
    """What the report calls it; null: its kind and first path."""
    clean: CleanConfig = CleanConfig()
    """Rules that its documents must satisfy."""


class _Files(_Source):
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders (searched through), globs or files; ~, {stdlib} and {site-packages} (of this Python) are filled in."""
    exclude: tuple[str, ...] = ()
    """Globs on the path below the folder, where * also matches /; matching files are left out."""
    suffixes: tuple[str, ...] | None = None
    """Endings of the files taken from folders; null: .txt .md .rst for text, .py for code, .jsonl and .jsonl.gz and
    .jsonl.zst for jsonl, .parquet for parquet."""
    max_file_bytes: Bytes | None = None
    """Larger files are left out; null: 200000 for code (larger ones are mostly data), no limit for the others."""


class _WholeFiles(_Files):
    markup: Markup = "none"
    """What to take the text out of; .gz and .dz files are unpacked first."""
    not_utf8: Literal["skip", "latin-1"] = "skip"
    """Files that are no UTF-8 are left out, or read as Latin-1; both are counted."""


class TextConfig(_WholeFiles):
    kind: Literal["text"] = "text"
    """text and code: each file is a document."""


class CodeConfig(_WholeFiles):
    kind: Literal["code"] = "code"


class JsonlConfig(_Files):
    kind: Literal["jsonl"] = "jsonl"
    """Each line is a document."""
    text_key: str = "text"
    """The key that holds the text."""


class ParquetConfig(_Files):
    kind: Literal["parquet"] = "parquet"
    """Each row is a document; needs the extra `datasets`."""
    text_key: str = "text"
    """The column that holds the text."""


class HuggingfaceConfig(_Source):
    kind: Literal["huggingface"] = "huggingface"
    """Rows by `datasets.load_dataset`; needs the extra `datasets`."""
    path: str
    """A name on the hub, or a builder such as json, text, parquet or arrow with data_files."""
    config: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """train, or a part of it such as train[:1%] (without streaming)."""
    data_files: tuple[str, ...] | None = None
    """Files or globs; null: what the data set says."""
    revision: str | None = None
    """Commit or branch on the hub; name a commit and the data cannot change."""
    streaming: bool = True
    """Read as it is fetched, or fetch and keep all of it first."""
    text_key: str = "text"
    """The column that holds the text."""


class StdinConfig(_Source):
    kind: Literal["stdin"] = "stdin"
    """Documents from the standard input."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """What stands between documents; null: each line is JSON."""
    text_key: str = "text"
    """The key that holds the text in each line of JSON."""


class DebianConfig(_Source):
    kind: Literal["debian"] = "debian"
    """Documentation in Debian's packages, which are fetched by apt-get and unpacked but not installed."""
    packages: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names; data_pipeline/debian.py says which of their files are taken."""
    cache: str = "~/.cache/lfm/debian"
    """Folder to fetch to; what is there is not fetched again."""


SourceConfig = Annotated[
    TextConfig | CodeConfig | JsonlConfig | ParquetConfig | HuggingfaceConfig | StdinConfig | DebianConfig,
    Field(discriminator="kind"),
]


def title(source: SourceConfig) -> str:
    """What a report calls a source."""
    if source.name is not None:
        return source.name
    match source:
        case _Files():
            return f"{source.kind} {source.paths[0]}"
        case HuggingfaceConfig():
            return f"{source.path} {source.config or ''}".strip()
        case DebianConfig():
            return "debian"
        case _:
            return source.kind


def find_files(sources: Sequence[SourceConfig], counts: Counter[str]) -> list[list[InputFile]]:
    """The files of each source; none of those that have no files.

    They are in the order of the config, and sorted by name within a folder.  A file reached twice, by two sources or
    through a symlink, is taken the first time only.  Adds to `counts`:
    files_found = files_repeated + files_too_large + files_unreadable + the number of files in the result.
    Raises UserError for a path that leads to no file.
    """
    seen: set[tuple[int, int]] = set()
    found = []
    for source in sources:
        match source:
            case TextConfig() | CodeConfig() | JsonlConfig() | ParquetConfig():
                suffixes = source.suffixes if source.suffixes is not None else _SUFFIXES[source.kind]
                paths = files.matching_paths(source.paths, suffixes, source.exclude)
                whole = source if isinstance(source, _WholeFiles) else _WholeFiles(paths=source.paths)
                wanted: list[tuple[Path, Markup]] = [(path, whole.markup) for path in paths]
                limit = source.max_file_bytes or _MAX_FILE_BYTES.get(source.kind)
                found.append(files.checked(wanted, counts, seen, max_file_bytes=limit, not_utf8=whole.not_utf8))
            case DebianConfig():
                wanted = debian.find(source.packages, source.cache)
                found.append(files.checked(wanted, counts, seen, max_file_bytes=None, not_utf8="latin-1"))
            case _:
                found.append([])
    return found


def read_batches(sources: Sequence[SourceConfig], found: Sequence[Sequence[InputFile]]) -> Iterator[Batch]:
    """The documents of all sources in order; `found` is what `find_files` found."""
    for index, (source, of_source) in enumerate(zip(sources, found, strict=True)):
        match source:
            case TextConfig() | CodeConfig() | DebianConfig():
                yield from _whole_files(index, of_source)
            case JsonlConfig():
                for file in of_source:
                    yield from _counted(index, _jsonl(index, file, source.text_key))
            case ParquetConfig():
                for file in of_source:
                    yield from _counted(index, files.parquet_batches(index, file, source.text_key))
            case HuggingfaceConfig():
                yield from hub.batches(index, source.model_dump(exclude={"kind", "name", "clean"}))
            case StdinConfig():
                yield from _stdin(index, source, sys.stdin.buffer)


def _counted(source: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of one file, which counts as read after the last, or as unreadable if not even opened."""
    try:
        yield from batches
    except OSError:
        yield TextBatch(source, 0, (), "files_unreadable")
    else:
        yield TextBatch(source, 0, (), "files_read")


def _whole_files(source: int, found: Sequence[InputFile]) -> Iterator[Batch]:
    group: list[InputFile] = []
    size = 0
    for file in found:
        group.append(file)
        size += file.num_bytes
        if size >= BATCH_BYTES or len(group) == BATCH_FILES:
            yield FileBatch(source, size, tuple(group))
            group, size = [], 0
    if group:
        yield FileBatch(source, size, tuple(group))


def _jsonl(source: int, file: InputFile, text_key: str) -> Iterator[Batch]:
    with files.opened(file.path) as (lines, position):
        yield from _line_batches(source, lines, str(file.path), text_key, position)


def _line_batches(source: int, lines: BinaryIO, origin: str, text_key: str, position: Any) -> Iterator[Batch]:
    before, number = 0, 1
    while group := lines.readlines(BATCH_BYTES):
        here = position()
        yield LineBatch(source, here - before, tuple(group), origin, number, text_key)
        before, number = here, number + len(group)


def _stdin(source: int, config: StdinConfig, stream: BinaryIO) -> Iterator[Batch]:
    if config.separator is None:
        yield from _line_batches(source, stream, "stdin", config.text_key, lambda: 0)
        return
    separator, held, number = config.separator.encode(), b"", 0
    while True:
        block = stream.read(BATCH_BYTES)
        *whole, held = (held + block).split(separator)
        if not block:
            whole, held = [*whole, held], b""
        found = []
        for text in whole:
            number += 1
            try:
                found.append((text.decode(), f"stdin:document {number}"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"document {number} of the standard input is no UTF-8 ({error.reason}); convert it first"
                ) from None
        yield TextBatch(source, sum(map(len, whole)), tuple(found))
        if not block:
            return
