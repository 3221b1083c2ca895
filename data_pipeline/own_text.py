"""A config for somebody's own text: what `lfm prepare book.txt [key=value ...]` leaves open is chosen for its size."""

import glob
import math
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.files import matches, other_names
from data_pipeline.pieces import first_bad_byte
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.sources import SUFFIXES, SourceConfig, find_files
from data_pipeline.unpack import has_suffix, is_packed
from lfm.errors import UserError
from lfm.files import behind_links, exists, expanded, open_file, shown

STANDARD_INPUT = "-"
_MOST_FILES_CUT = 200
"""Of more files, whole ones are held out."""
_SUFFIXES = {**SUFFIXES, "text": (*SUFFIXES["text"], *SUFFIXES["code"])}
_EVERY_SUFFIX = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_EXPANSION = {"jsonl": 1.0, "parquet": 2.0, "text": 1.0}
"""About how many bytes of text a byte of a file of this kind is; 3 times as many if it is compressed."""

_NO_TEXT = {
    b"%PDF-": "a PDF; take its text out of it first, such as by `pdftotext`",
    b"PK\x03\x04": "a ZIP archive, as books and documents of Word are; take its text out of it first",
    b"\xff\xfe": "text in UTF-16; convert it by `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "text in UTF-16; convert it by `iconv -f utf-16 -t utf-8`",
}
"""How files begin that are often given, and what they are."""


@dataclass(frozen=True)
class OwnText:
    config: PrepareConfig
    reasons: tuple[str, ...]
    """A line for each choice."""
    standard_input: Path | None
    """The file of the sources that holds what came from there."""

    @property
    def next_command(self) -> str:
        return f"lfm train --data {shlex.quote(self.config.output)} --family liquidnet --minutes 5"


def is_key(word: str) -> bool:
    """Whether a word of the command line is `key=value`, and no file."""
    return re.match(r"[a-z_][\w.]*=", word) is not None and not exists(Path(word[:255]))


def own_text(words: Sequence[str], *, spool: Path) -> OwnText:
    """What to prepare, of sources and `key=value` overrides; the standard input (-) is kept in the folder `spool`.

    Raises UserError for a source that leads to nothing, or is no text.
    """
    text_keys = [word for word in words if is_key(word) and word.startswith("text_key=")]
    overrides = [word for word in words if is_key(word) and word not in text_keys]
    names = [word for word in words if not is_key(word)]
    if not names:
        raise UserError(
            "there is nothing to prepare; give files of text, as in `lfm prepare book.txt`, or --config FILE"
        )
    given = {override.partition("=")[0].strip() for override in overrides}
    output = next((word.partition("=")[2] for word in overrides if word.startswith("output=")), None)
    output = output or f"data/{_stem(names[0])}"
    kept = _kept_input(spool) if STANDARD_INPUT in names else None
    paths = [str(kept) if name == STANDARD_INPUT else name for name in names]
    by_kind = _by_kind(paths, exclude := _below(output, paths), {str(kept): "the standard input"})
    sources: list[dict[str, Any]] = [
        {"kind": kind, "paths": of_kind, "suffixes": list(_SUFFIXES[kind]), "exclude": exclude}
        for kind, of_kind in by_kind.items()
    ]
    if text_keys:
        _set_text_key(sources, text_keys[-1], are_given="sources" in given)
    found = find_files([TypeAdapter(SourceConfig).validate_python(source) for source in sources], Counter())
    texts = [file.path for kind, files in zip(by_kind, found, strict=True) for file in files if kind == "text"]
    num_bytes = sum(
        int(file.num_bytes * _EXPANSION[kind] * (3 if is_packed(file.path) else 1))
        for kind, files in zip(by_kind, found, strict=True)
        for file in files
    )
    is_cut = 0 < len(texts) <= _MOST_FILES_CUT
    if is_cut:
        _check_not_packed(texts)
    tree, reasons = _choices(num_bytes, is_cut=is_cut, reads_tokenizer=bool({"tokenizer", "tokenizer.file"} & given))
    config = PrepareConfig.with_overrides(
        {"output": output, "sources": sources, **tree}, overrides, source="what is chosen for the text"
    )
    left_out = _left_out(paths, exclude)
    if left_out:
        reasons = {"sources": left_out} | reasons
    asked = {key.partition(".")[0] for key in given}
    return OwnText(config, tuple(line for key, line in reasons.items() if key not in asked), kept)


def _choices(num_bytes: int, *, is_cut: bool, reads_tokenizer: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys for so much text, and why each is so."""
    size = _size(num_bytes)
    # Both grow with the root of the text, as its distinct words about do.
    entries = min(32768, max(320, 64 * round((256 + 2 * math.sqrt(num_bytes)) / 64)))
    seq_length = min(1024, max(16, 2 ** round(math.log2(max(1.0, math.sqrt(num_bytes) / 4)))))
    share = 0.1 if num_bytes < 100_000 else min(0.05, round(500_000 / num_bytes, 6))
    held_out = f"the last {share:.2%} of each file" if is_cut else f"{share:.2%} of the documents, by their hash"
    tree: dict[str, Any] = {
        "tokenizer": {"file": None},
        "seq_length": seq_length,
        "validation": "tail" if is_cut else "hash",
        "validation_fraction": share,
    }
    reasons = {
        "seq_length": f"rows: {seq_length} ids; longer ones would be too few in {size}",
        "validation_fraction": f"held out: {held_out}, to measure what is learnt",
    }
    if not reads_tokenizer:
        tree["tokenizer"] = {"train_vocab_size": entries, "allow_smaller": True}
        line = f"vocabulary: at most {entries:,} entries; more would be too rare in {size}"
        reasons = {"tokenizer": f"{line}; it is trained on the training part alone"} | reasons
    return tree, reasons


def _by_kind(paths: Sequence[str], exclude: list[str], called: Mapping[str, str]) -> dict[str, list[str]]:
    """Paths by the kind of source that reads them, in the order of their first.

    Raises UserError, which says of a path what it is `called`.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        files = matches(path, _EVERY_SUFFIX, exclude)
        if not files:
            is_folder = "://" not in path and expanded(path).is_dir()
            lacks = f"holds no {' '.join(_EVERY_SUFFIX)} file" if is_folder else "leads to no file"
            if is_folder and (left_out := _left_out([path], exclude)):
                lacks += f" ({left_out})"
            raise UserError(f"source {shown(path)} {lacks}; correct it")
        kinds = {kind: [file for file in files if _kind(file) == kind] for kind in dict.fromkeys(map(_kind, files))}
        is_one = "://" not in path and len(files) == 1 and expanded(path).is_file()
        if is_one and "text" in kinds:
            _check_is_text(files[0], called.get(path, path))
        for kind, of_kind in kinds.items():
            # A folder is searched by suffix; what a glob found may be of several kinds.
            whole = len(kinds) == 1 or ("://" not in path and expanded(path).is_dir())
            found.setdefault(kind, []).extend([path] if whole else [str(file) for file in of_kind])
    return found


def _left_out(paths: Sequence[str], exclude: list[str]) -> str:
    """How many files in folders have names that are not taken; none: ''."""
    folders = [path for path in paths if "://" not in path and expanded(path).is_dir()]
    names = [
        f"{folder.rstrip('/')}/{name}"
        for folder in folders
        for name in other_names(expanded(folder), _EVERY_SUFFIX, exclude)
    ]
    if not names:
        return ""
    visible = (name for name in names if "/." not in name)
    files = "1 file" if len(names) == 1 else f"{len(names):,} files"
    return f"left out: {files} with other names, such as {shown(next(visible, names[0]))}"


def _set_text_key(sources: list[dict[str, Any]], word: str, *, are_given: bool) -> None:
    """Of all sources that have one.  Raises UserError if none has."""
    of_records = [source for source in sources if source["kind"] != "text"]
    if are_given or not of_records:
        why = "sources= says where each text is" if are_given else "it is for .jsonl and .parquet, and there are none"
        raise UserError(f"{word}: {why}; remove it")
    for source in of_records:
        source["text_key"] = word.partition("=")[2]


def _kind(path: Path) -> str:
    return next((kind for kind in ("jsonl", "parquet") if has_suffix(path.name, SUFFIXES[kind])), "text")


def _check_is_text(path: Path, name: str) -> None:
    if is_packed(path):
        return
    with open_file(path) as file:
        beginning = file.read(8)
    for magic, what in _NO_TEXT.items():
        if beginning.startswith(magic):
            raise UserError(f"{shown(name)} is {what}")
    bad = first_bad_byte(path)
    if bad is not None:
        with open_file(path) as file:
            file.seek(bad)
            byte = file.read(1)
        what = f"0x{byte[0]:02x}" if byte else "cut short"
        raise UserError(
            f"{shown(name)} is no text in UTF-8 (byte {bad:,} is {what}); convert it from its encoding, for "
            "instance by `iconv -f cp1251 -t utf-8` or `iconv -f latin1 -t utf-8`, or take its text out of it first"
        )


def _check_not_packed(paths: Sequence[Path]) -> None:
    packed = [path for path in paths if is_packed(path)]
    if packed:
        raise UserError(
            f"{shown(packed[0])} is compressed, and a few files of text are split by position, which cannot be done "
            f"before they are unpacked; unpack it, or pipe it in: `zcat FILE | lfm prepare - output=DIR`"
        )


def _below(output: str, paths: Sequence[str]) -> list[str]:
    """What to leave out of folders so that a data set prepared inside is not read as text."""
    folder, exclude = behind_links(expanded(output).absolute()), []
    for path in paths:
        root = behind_links(expanded(path).absolute()) if "://" not in path else None
        if root is not None and root != folder and folder.is_relative_to(root):
            inner = glob.escape(folder.relative_to(root).as_posix())
            exclude.append(f"{inner}/*")
    return exclude


def _kept_input(spool: Path) -> Path:
    path = spool / "stdin.txt"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    if os.path.getsize(path) == 0:
        raise UserError("the standard input (-) is empty; pipe text into it")
    os.utime(path, (0, 0))  # when it was piped in says nothing of it
    return path


def _stem(name: str) -> str:
    """Of book.txt, book.jsonl.gz, a folder, a glob or a URL, what the data set is called."""
    if name == STANDARD_INPUT:
        return "stdin"
    path = PurePosixPath(name.partition("://")[2] if "://" in name else os.path.abspath(expanded(name)))
    while glob.has_magic(path.name) and path.parent != path and not exists(Path(path)):
        path = path.parent
    stem = path.name
    while is_packed(PurePosixPath(stem)):
        stem = PurePosixPath(stem).stem
    return PurePosixPath(stem).stem or "text"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"
