"""Where text comes from: the kinds of sources in a config, and their documents in batches, in a fixed order."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline import debian, files, hub
from data_pipeline.batches import (
    BATCH_BYTES,
    BATCH_FILES,
    Batch,
    FileBatch,
    InputFile,
    Left,
    LineBatch,
    PieceBatch,
    TextBatch,
)
from data_pipeline.clean import CleanConfig
from data_pipeline.markup import Markup
from data_pipeline.pieces import cut, first_bad_byte
from data_pipeline.unpack import Damaged, Limits, Stream, Unreadable, is_packed, opened, records
from lfm.config import Bytes, Config, Count, PathText
from lfm.errors import UserError
from lfm.files import shown

SUFFIXES = {
    "text": (".txt", ".md", ".rst"),
    "code": (".py",),
    "jsonl": (".jsonl", *(f".jsonl{packed}" for packed in (".gz", ".zst", ".xz", ".bz2"))),
    "parquet": (".parquet",),
}
_MAX_FILE_BYTES = {"code": 200_000}


class _Source(Config):
    name: str | None = None
    """What the report calls it; null: its kind and first path."""
    clean: CleanConfig = CleanConfig()
    """Rules that its documents must satisfy."""
    max_record_bytes: Bytes = 1 << 27
    """Longer documents, lines and rows are left out, and counted, without being held in memory."""

    @property
    def limits(self) -> Limits:
        return Limits(self.max_record_bytes, expansion=1)


class _Packed(_Source):
    max_expansion: Count = 250
    """Times its size that a compressed file may become: a document of more, and of more than a mebibyte, is left out
    and counted; a file of lines of more, and of more than a record, is refused."""

    @property
    def limits(self) -> Limits:
        return Limits(self.max_record_bytes, self.max_expansion)


class _Files(_Packed):
    paths: Annotated[tuple[PathText, ...], Field(min_length=1)]
    """Folders (searched through), globs or files; ~, {stdlib} and {site-packages} (of this Python) are filled in.  With
    https://, s3:// (extra `remote`) or gs://, they are fetched first and kept in ~/.cache/lfm/fetched.  Files that end
    in .gz, .dz, .bz2, .xz or .zst are unpacked."""
    exclude: tuple[str, ...] = ()
    """Globs on the path below the folder, where * also matches /; matching files are left out."""
    suffixes: tuple[str, ...] | None = None
    """Endings of the files taken from folders, in capitals or not; null: .txt .md .rst for text, .py for code, .jsonl
    (also compressed) for jsonl, .parquet for parquet."""
    max_file_bytes: Bytes | None = None
    """Larger files are left out; null: 200000 for code (larger ones are mostly data), no limit for the others."""


class _WholeFiles(_Files):
    markup: Markup = "none"
    """What to take the text out of."""
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
    data_files: tuple[PathText, ...] | None = None
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


class DebianConfig(_Packed):
    kind: Literal["debian"] = "debian"
    """Documentation in Debian's packages, which are fetched by apt-get and unpacked but not installed."""
    packages: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names; data_pipeline/debian.py says which of their files are taken."""
    cache: PathText = "~/.cache/lfm/debian"
    """Folder to fetch to; what is there is not fetched again."""


SourceConfig = Annotated[
    TextConfig | CodeConfig | JsonlConfig | ParquetConfig | HuggingfaceConfig | StdinConfig | DebianConfig,
    Field(discriminator="kind"),
]


Labels = Literal["all", "completion"]


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
    files_found = files_repeated + files_too_large + files_unreadable + files_not_regular + the files in the result.
    Raises UserError for a path that leads to no file.
    """
    seen: set[tuple[int, int]] = set()
    found = []
    for source in sources:
        match source:
            case TextConfig() | CodeConfig() | JsonlConfig() | ParquetConfig():
                suffixes = source.suffixes if source.suffixes is not None else SUFFIXES[source.kind]
                paths = files.matching_paths(source.paths, suffixes, source.exclude)
                whole = source if isinstance(source, _WholeFiles) else _WholeFiles(paths=source.paths)
                wanted: list[tuple[Path, Markup]] = [(path, whole.markup) for path in paths]
                limit = source.max_file_bytes or _MAX_FILE_BYTES.get(source.kind)
                found.append(
                    files.checked(
                        wanted,
                        counts,
                        seen,
                        max_file_bytes=limit,
                        not_utf8=whole.not_utf8,
                        limits=source.limits,
                    )
                )
            case DebianConfig():
                wanted = debian.find(source.packages, source.cache)
                found.append(
                    files.checked(wanted, counts, seen, max_file_bytes=None, not_utf8="latin-1", limits=source.limits)
                )
            case _:
                found.append([])
    return found


def read_batches(
    sources: Sequence[SourceConfig],
    found: Sequence[Sequence[InputFile]],
    labels: Labels = "all",
    *,
    tail: float | None = None,
) -> Iterator[Batch]:
    """The documents of all sources in order; `found` is what `find_files` found.

    With `tail`, each file of text is cut into pieces, and its last ones, about so large a share of it, are held out.
    """
    for index, (source, of_source) in enumerate(zip(sources, found, strict=True)):
        match source:
            case TextConfig() | CodeConfig() if tail is not None:
                for file in of_source:
                    yield from _in_pieces(index, file, tail)
            case TextConfig() | CodeConfig() | DebianConfig():
                yield from _whole_files(index, of_source)
            case JsonlConfig():
                for file in of_source:
                    yield from _counted(index, _jsonl(index, file, source.text_key if labels == "all" else None))
            case ParquetConfig():
                for file in of_source:
                    yield from _counted(index, files.parquet_batches(index, file, source.text_key))
            case HuggingfaceConfig():
                yield from hub.batches(index, source.model_dump(exclude={"kind", "name", "clean"}), source.limits)
            case StdinConfig():
                text_key = source.text_key if labels == "all" else None
                yield from _stdin(index, source, text_key, sys.stdin.buffer)


def _counted(source: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of one file, which counts as read after the last, or as unreadable if not even opened."""
    try:
        yield from batches
    except Damaged:
        raise
    except Unreadable:
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


def _in_pieces(source: int, file: InputFile, tail: float) -> Iterator[Batch]:
    """What cannot be cut, because it is compressed or no UTF-8, is read as a whole, or left out and counted."""
    try:
        is_text = not is_packed(file.path) and file.num_bytes > 0 and first_bad_byte(file.path) is None
    except UserError:
        is_text = False
    if not is_text:
        yield FileBatch(source, file.num_bytes, (file,))
        return
    *others, last = cut(file.path, file.num_bytes, tail=tail, piece_bytes=BATCH_BYTES)
    yield from (PieceBatch(source, file, piece, is_last=False) for piece in others)
    yield PieceBatch(source, file, last, is_last=True)


def _jsonl(source: int, file: InputFile, text_key: str | None) -> Iterator[Batch]:
    with opened(file.path, file.limits) as (stream, position):
        yield from _line_batches(source, stream, shown(file.path), text_key, position, file.limits)


def _line_batches(
    source: int, stream: Stream, origin: str, text_key: str | None, position: Callable[[], int], limits: Limits
) -> Iterator[Batch]:
    before, number, size = 0, 1, 0
    group: list[bytes | None] = []

    def batch() -> LineBatch:
        return LineBatch(source, position() - before, tuple(group), origin, number, text_key)

    for line in records(stream, b"\n", limits.record_bytes):
        group.append(line)
        size += len(line or b"") + 1
        if size >= BATCH_BYTES:
            yield batch()
            before, number, size = position(), number + len(group), 0
            group = []
    if group:
        yield batch()


def _stdin(source: int, config: StdinConfig, text_key: str | None, stream: Stream) -> Iterator[Batch]:
    if config.separator is None:
        yield from _line_batches(source, stream, "stdin", text_key, lambda: 0, config.limits)
        return
    group: list[tuple[str | Left, str]] = []
    size = 0
    for number, text in enumerate(records(stream, config.separator.encode(), config.max_record_bytes), start=1):
        origin = f"stdin:document {number}"
        encoding = "utf-8-sig" if number == 1 else "utf-8"  # a byte-order mark at the beginning is no text
        try:
            group.append((Left.TOO_LONG if text is None else text.decode(encoding), origin))
        except UnicodeDecodeError as error:
            raise UserError(
                f"document {number} of the standard input is no UTF-8 ({error.reason}); convert it first"
            ) from None
        size += len(text or b"")
        if size >= BATCH_BYTES:
            yield TextBatch(source, size, tuple(group))
            group, size = [], 0
    if group:
        yield TextBatch(source, size, tuple(group))
