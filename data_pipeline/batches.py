"""Documents, and batches of them: the unit of work that is handed to a process.

What is in a batch depends on the sources alone, so neither counts nor ids depend on how many processes there are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from data_pipeline.completions import Span, spans_of
from data_pipeline.markup import Markup, texts_of_markup
from data_pipeline.pieces import Piece
from data_pipeline.unpack import Limits, Unreadable, is_packed, opened
from lfm.errors import UserError
from lfm.files import open_file, shown

BATCH_BYTES = 1 << 19
BATCH_FILES = 256
_SMALL_BYTES = 1 << 20
_ENCODING = "utf-8-sig"
"""Of a file: a byte-order mark at its beginning is no text."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Text = tuple[str, str]
"""A text and its origin."""


class Left(Enum):
    """In place of a value that was not even looked at."""

    TOO_LONG = "too_long"


@dataclass(frozen=True)
class Document:
    text: str
    num_bytes: int
    """Of the text in UTF-8."""
    origin: str
    """File, and line or row in it, for messages."""
    spans: tuple[Span, ...] = ()
    """Its parts, end to end, where only some are labels; (): all of it is."""
    held_out: bool | None = None
    """Whether it is of the validation split; None: its hash decides."""


@dataclass(frozen=True)
class InputFile:
    path: Path
    not_utf8: Literal["skip", "latin-1"]
    markup: Markup
    num_bytes: int
    mtime_ns: int
    limits: Limits


@dataclass(frozen=True)
class FileBatch:
    """Files that are read as a whole, compressed ones unpacked."""

    source: int
    num_bytes: int
    """Of input, for the progress bar."""
    files: tuple[InputFile, ...]

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """The texts in the files.  Those that cannot be read, are too long or no UTF-8 are left out and counted."""
        for file in self.files:
            try:
                text = _read(file, counts)
            except Unreadable:
                counts["files_unreadable"] += 1
            except UnicodeError:
                counts["files_not_utf8"] += 1
            else:
                if text is None:
                    counts["files_too_large"] += 1
                    continue
                counts["files_read"] += 1
                yield from texts_of_markup(text, file.markup, origin=shown(file.path))


@dataclass(frozen=True)
class PieceBatch:
    """A piece of a file of text, which is a document of its own."""

    source: int
    file: InputFile
    piece: Piece
    is_last: bool

    @property
    def num_bytes(self) -> int:
        return self.piece.end - self.piece.start

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """Its text.  Raises UserError if the file has changed since it was cut."""
        counts["files_read"] += self.is_last
        name = shown(self.file.path)
        with open_file(self.file.path) as file:
            file.seek(self.piece.start)
            content = file.read(self.num_bytes)
        try:
            text = content.decode(_ENCODING if self.piece.start == 0 else "utf-8")
        except UnicodeDecodeError:
            text = None
        if text is None or len(content) != self.num_bytes:
            raise UserError(f"{name} has changed while it was read; prepare it again when it is at rest")
        yield text, f"{name}:bytes {self.piece.start} to {self.piece.end}"


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of JSON."""

    source: int
    num_bytes: int
    lines: tuple[bytes | None, ...]
    """None: a line that is too long."""
    origin: str
    first: int
    """Number of the first line."""
    text_key: str | None
    """None: each line is a prompt and its completion, or a conversation."""

    def spans(self, counts: Counter[str]) -> Iterator[tuple[tuple[Span, ...], str]]:
        """The parts of each line's document and its origin; lines that are no JSON in UTF-8 are left out and counted.

        Raises UserError naming the first line that is neither a prompt and its completion nor a conversation.
        """
        if self.first == 1:
            self._check_lines()
        for number, line in enumerate(self.lines, start=self.first):
            if line is None:
                counts["documents_too_long"] += 1
                continue
            if not line.strip():
                continue
            try:
                record = _json(line)
            except (ValueError, RecursionError):
                counts["lines_malformed"] += 1
                continue
            origin = f"{self.origin}:{number}"
            spans = spans_of(record, origin)
            if b"\\u" in line and any(_LONE_SURROGATE.search(span.text) for span in spans):
                counts["lines_malformed"] += 1
                continue
            yield spans, origin

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """The text of each line; lines that are no JSON in UTF-8 or hold no text are left out and counted by reason.

        Raises UserError if the first lines of a file are parts of one JSON document, or none of them has a text or
        null: that is a mistake in the config, or another kind of file.
        """
        assert self.text_key is not None
        if self.first == 1:
            self._check_lines()
        found, problem = False, None
        for number, line in enumerate(self.lines, start=self.first):
            if line is None:
                counts["documents_too_long"] += 1
                continue
            if not line.strip():
                continue
            origin = f"{self.origin}:{number}"
            try:
                record = _json(line)
            except (ValueError, RecursionError):  # neither JSON nor UTF-8, or nested beyond measure
                counts["lines_malformed"] += 1
                problem = problem or f"{origin} is no line of JSON in UTF-8; rewrite the file, or exclude it"
                continue
            if not isinstance(record, dict):
                counts["lines_without_keys"] += 1
                problem = problem or f"{origin} holds {_name_of_type(record)} in place of an object with keys"
                continue
            if self.text_key not in record:
                counts["documents_without_text_key"] += 1
                problem = problem or (
                    f"{origin} has no text under text_key={self.text_key!r} (its keys: {shown(', '.join(record))}); "
                    f"{_way_out(record)}"
                )
                continue
            value = record[self.text_key]
            found = found or value is None
            text = _text_of(value, counts)
            if isinstance(text, _WrongType):
                problem = problem or f"{origin} has {text.name} under text_key={self.text_key!r}, which takes text"
                continue
            if text is None:
                continue
            found = True
            if b"\\u" in line and _LONE_SURROGATE.search(text):  # JSON can write them, UTF-8 cannot
                counts["lines_malformed"] += 1
                continue
            yield text, origin
        if self.first == 1 and problem is not None and not found:
            raise UserError(f"{problem}; none of its first {len(self.lines):,} lines has a text")

    def _check_lines(self) -> None:
        first, *rest = [line.strip() for line in self.lines[:100] if line and line.strip()][:2] or [b""]
        if first.removeprefix(b"\xef\xbb\xbf") in (b"[", b"{", b"[{") and not _is_object(rest):
            raise UserError(
                f"{self.origin} is one JSON document over many lines, and kind=jsonl takes one in each line; rewrite "
                "it, such as by `jq -c '.[]'`"
            )


@dataclass(frozen=True)
class TextBatch:
    """Texts that are in memory already."""

    source: int
    num_bytes: int
    found: tuple[tuple[Any, str], ...]
    """Values, which should be texts, and their origins."""
    counted: str | None = None
    """What one more of is to be counted, such as files_read."""
    column: str | None = None
    """Where they are from, for messages, if these are the first from there."""

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """All of them; what is no text is left out and counted by reason.

        Raises UserError if the first ones of a column are of another type.
        """
        if self.counted is not None:
            counts[self.counted] += 1
        found, problem = False, None
        for value, origin in self.found:
            text = _text_of(value, counts)
            if isinstance(text, _WrongType):
                problem = problem or f"{origin} has {text.name} in the column {self.column}, which takes text"
                continue
            found = found or text is not None or value is None
            if text is not None:
                yield text, origin
        if self.column is not None and problem is not None and not found:
            raise UserError(
                f"{problem}; none of its first {len(self.found):,} rows has a text; set text_key to another"
            )


Batch = FileBatch | PieceBatch | LineBatch | TextBatch


def documents(batch: Batch, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a batch; empty texts are left out.  What is left out and what is given is added to `counts`."""
    if isinstance(batch, LineBatch) and batch.text_key is None:
        texts = (("".join(span.text for span in spans), origin, spans) for spans, origin in batch.spans(counts))
    else:
        texts = ((text, origin, ()) for text, origin in batch.texts(counts))
    held_out = batch.piece.held_out if isinstance(batch, PieceBatch) else None
    for text, origin, spans in texts:
        if not text or text.isspace():
            counts["documents_empty"] += 1
            continue
        num_bytes = len(text) if text.isascii() else len(text.encode())
        counts["documents"] += 1
        counts["bytes"] += num_bytes
        yield Document(text, num_bytes, origin, spans, held_out)


@dataclass(frozen=True)
class _WrongType:
    name: str


def _text_of(value: Any, counts: Counter[str]) -> str | _WrongType | None:
    """The text that a row holds; None, or a type that no text is of, and it is counted."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            counts["documents_not_utf8"] += 1
    elif value is None:
        counts["documents_null"] += 1
    elif value is Left.TOO_LONG:
        counts["documents_too_long"] += 1
    else:
        counts[f"documents_of_type_{type(value).__name__}"] += 1
        return _WrongType(_name_of_type(value))
    return None


def _way_out(record: dict[str, Any]) -> str:
    """For a record without the key of the text."""
    if "messages" in record:
        return "set labels=completion, which reads messages"
    if {"prompt", "completion"} <= record.keys():
        return "set labels=completion, which reads prompts and completions, or text_key to one of them"
    return "set text_key to one of them"


def _name_of_type(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _json(line: bytes) -> Any:
    """What a line says; `json.loads` of bytes would take pieces of UTF-16 and surrogates, too.  Raises ValueError."""
    return json.loads(line.decode(_ENCODING))


def _is_object(lines: list[bytes]) -> bool:
    try:
        return all(isinstance(_json(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _read(file: InputFile, counts: Counter[str]) -> str | None:
    """The content of a file; None if it is longer than a document may be."""
    limit = file.limits.record_bytes
    if is_packed(file.path):  # a batch has many
        limit = min(limit, max(_SMALL_BYTES, file.limits.expansion * file.num_bytes))
    with opened(file.path, file.limits) as (stream, _):
        # To ask for the limit would take room for it; the file may have grown since it was found.
        content = stream.read(min(limit, file.num_bytes) + 1)
        if len(content) > file.num_bytes:
            content += stream.read(limit + 1 - len(content))
    if len(content) > limit:
        return None
    try:
        return content.decode(_ENCODING)
    except UnicodeDecodeError:
        if file.not_utf8 == "skip":
            raise
        counts["files_as_latin1"] += 1
        return content.decode("latin-1")
