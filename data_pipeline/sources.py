"""Where text comes from: folders of text or code and JSON lines, as a stream of documents in a fixed order."""

import glob
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lfm.config import Config
from lfm.errors import UserError

_SUFFIXES = {"text": (".txt", ".md", ".rst"), "code": (".py",), "jsonl": (".jsonl",)}
_MAX_FILE_BYTES = {"text": None, "code": 200_000, "jsonl": None}


class SourceConfig(Config):
    kind: Literal["text", "code", "jsonl"]
    """text and code: each file is a document; jsonl: each line is one."""
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders (searched through), globs or files; ~, {stdlib} and {site-packages} (of this Python) are filled in."""
    exclude: tuple[str, ...] = ()
    """Globs on the path below the folder, where * also matches /; matching files are left out."""
    suffixes: tuple[str, ...] | None = None
    """Endings of the files taken from folders; null: .txt .md .rst for text, .py for code, .jsonl for jsonl."""
    text_key: str = "text"
    """The key that holds the text in each line of a jsonl file."""
    max_file_bytes: PositiveInt | None = None
    """Larger files are left out; null: 200000 for code (larger ones are mostly data), no limit for the others."""
    not_utf8: Literal["skip", "latin-1"] = "skip"
    """Text and code files that are no UTF-8 are left out, or read as Latin-1; both are counted."""

    @model_validator(mode="after")
    def _latin1_files_only(self) -> "SourceConfig":
        if self.kind == "jsonl" and self.not_utf8 != "skip":
            raise ValueError(f"not_utf8={self.not_utf8}: JSON lines are UTF-8; set not_utf8=skip for kind=jsonl")
        return self


@dataclass(frozen=True)
class InputFile:
    path: Path
    kind: Literal["text", "code", "jsonl"]
    text_key: str
    not_utf8: Literal["skip", "latin-1"]
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Document:
    text: str
    num_bytes: int
    """Of the text in UTF-8."""
    origin: str
    """File, and line in a jsonl file, for messages."""


def find_files(sources: Sequence[SourceConfig], counts: Counter[str]) -> list[InputFile]:
    """The files of all sources, in the order of the config and sorted by name within a folder.

    A file reached twice, by two sources or through a symlink, is taken the first time only.  Adds to `counts`:
    files_found = files_repeated + files_too_large + files_unreadable + the length of the result.
    Raises UserError for a path that leads to no file.
    """
    files = []
    seen = set()
    for source in sources:
        limit = source.max_file_bytes or _MAX_FILE_BYTES[source.kind]
        for pattern in source.paths:
            for path in _matches(pattern, source):
                counts["files_found"] += 1
                real = path.resolve()
                if real in seen:
                    counts["files_repeated"] += 1
                    continue
                seen.add(real)
                try:
                    status = real.stat()
                except OSError:
                    status = None
                if status is None or not stat.S_ISREG(status.st_mode):
                    counts["files_unreadable"] += 1
                    continue
                if limit is not None and status.st_size > limit:
                    counts["files_too_large"] += 1
                    continue
                files.append(
                    InputFile(path, source.kind, source.text_key, source.not_utf8, status.st_size, status.st_mtime_ns)
                )
    return files


def read_documents(files: Sequence[InputFile], counts: Counter[str]) -> Iterator[Document]:
    """The documents of `files` in order.

    Files and lines that are no readable UTF-8 (or no JSON), and empty texts, are left out and counted in `counts`, as
    is what is given.  Raises UserError for a jsonl line without its text key: that is a mistake in the config.
    """
    for file in files:
        try:
            found = _json_lines(file, counts) if file.kind == "jsonl" else _whole_file(file, counts)
            for text, origin in found:
                num_bytes = len(text.encode())
                if not text.strip():
                    counts["documents_empty"] += 1
                    continue
                counts["documents"] += 1
                counts["bytes"] += num_bytes
                yield Document(text, num_bytes, origin)
        except OSError:
            counts["files_unreadable"] += 1
        except UnicodeError:
            counts["files_not_utf8"] += 1
        else:
            counts["files_read"] += 1


def _matches(pattern: str, source: SourceConfig) -> list[Path]:
    filled = pattern
    for name, key in (("{stdlib}", "stdlib"), ("{site-packages}", "purelib")):
        filled = filled.replace(name, sysconfig.get_path(key))
    filled = os.path.abspath(os.path.expanduser(filled))
    suffixes = source.suffixes if source.suffixes is not None else _SUFFIXES[source.kind]
    found = []
    for match in [filled] if os.path.exists(filled) else sorted(glob.glob(filled, recursive=True)):
        root = Path(match)
        if not root.is_dir():
            found.append(root)  # named one by one or by a glob: taken whatever its suffix
            continue
        found += [path for path in _walk(root, root, source.exclude, seen=set()) if path.name.endswith(suffixes)]
    if not found:
        raise UserError(f"source path {pattern!r} leads to no {' '.join(suffixes)} file; correct it or remove it")
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


def _whole_file(file: InputFile, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    content = file.path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        if file.not_utf8 == "skip":
            raise
        text = content.decode("latin-1")
        counts["files_as_latin1"] += 1
    yield text, str(file.path)


def _json_lines(file: InputFile, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{file.path}:{number}"
            try:
                record = json.loads(line)
            except ValueError:  # neither JSON nor UTF-8
                counts["lines_malformed"] += 1
                continue
            text = record.get(file.text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else "none"
                raise UserError(
                    f"{origin} has no text under text_key={file.text_key!r} (its keys: {keys}); "
                    "set text_key to one of them"
                )
            if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can write them, UTF-8 cannot
                counts["lines_malformed"] += 1
                continue
            yield text, origin
