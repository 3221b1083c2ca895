"""Documents, and batches of them: the unit of work that is handed to a process.

What is in a batch depends on the sources alone, so neither counts nor ids depend on how many processes there are.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.markup import Markup, texts_of_markup
from lfm.errors import UserError

BATCH_BYTES = 1 << 19
BATCH_FILES = 256

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Text = tuple[str, str]
"""A text and its origin."""


@dataclass(frozen=True)
class Document:
    text: str
    num_bytes: int
    """Of the text in UTF-8."""
    origin: str
    """File, and line or row in it, for messages."""


@dataclass(frozen=True)
class InputFile:
    path: Path
    not_utf8: Literal["skip", "latin-1"]
    markup: Markup
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FileBatch:
    """Files that are read as a whole, .gz and .dz ones unpacked."""

    source: int
    num_bytes: int
    """Of input, for the progress bar."""
    files: tuple[InputFile, ...]

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """The texts in the files.  Those that cannot be read or are no UTF-8 are left out and counted."""
        for file in self.files:
            try:
                text = _read(file, counts)
            except (OSError, EOFError, zlib.error):
                counts["files_unreadable"] += 1
            except UnicodeError:
                counts["files_not_utf8"] += 1
            else:
                counts["files_read"] += 1
                yield from texts_of_markup(text, file.markup, origin=str(file.path))


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of JSON."""

    source: int
    num_bytes: int
    lines: tuple[bytes, ...]
    origin: str
    first: int
    """Number of the first line."""
    text_key: str

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """The text of each line; lines that are no JSON in UTF-8 are left out and counted.

        Raises UserError for a line without its text key: that is a mistake in the config.
        """
        for number, line in enumerate(self.lines, start=self.first):
            if not line.strip():
                continue
            origin = f"{self.origin}:{number}"
            try:
                record = json.loads(line)
            except ValueError:  # neither JSON nor UTF-8
                counts["lines_malformed"] += 1
                continue
            text = record.get(self.text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else "none"
                raise UserError(
                    f"{origin} has no text under text_key={self.text_key!r} (its keys: {keys}); "
                    "set text_key to one of them"
                )
            if b"\\u" in line and _LONE_SURROGATE.search(text):  # JSON can write them, UTF-8 cannot
                counts["lines_malformed"] += 1
                continue
            yield text, origin


@dataclass(frozen=True)
class TextBatch:
    """Texts that are in memory already."""

    source: int
    num_bytes: int
    found: tuple[Text, ...]
    counted: str | None = None
    """What one more of is to be counted, such as files_read."""

    def texts(self, counts: Counter[str]) -> Iterator[Text]:
        """All of them."""
        if self.counted is not None:
            counts[self.counted] += 1
        yield from self.found


Batch = FileBatch | LineBatch | TextBatch


def documents(batch: Batch, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a batch; empty texts are left out.  What is left out and what is given is added to `counts`."""
    for text, origin in batch.texts(counts):
        if not text or text.isspace():
            counts["documents_empty"] += 1
            continue
        num_bytes = len(text) if text.isascii() else len(text.encode())
        counts["documents"] += 1
        counts["bytes"] += num_bytes
        yield Document(text, num_bytes, origin)


def _read(file: InputFile, counts: Counter[str]) -> str:
    content = file.path.read_bytes()
    if file.path.suffix in (".gz", ".dz"):
        content = gzip.decompress(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        if file.not_utf8 == "skip":
            raise
        counts["files_as_latin1"] += 1
        return content.decode("latin-1")
