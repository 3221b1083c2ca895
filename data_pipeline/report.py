"""report.json: what a preparation did, and what it left beside the splits; the same in words."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm.errors import UserError
from lfm.files import exists, file_size, open_file, read_file, write_durably

REPORT_NAME = "report.json"
DROPPED_NAME = "dropped.jsonl"
"""A few documents that each rule dropped, to be looked at."""
TEXT_NAME = "validation.txt"

_LEFT_OUT = re.compile(r"(files_(?!found|read)|lines_|documents_|dropped_by_)")
_AGAIN = "restore it from a copy or prepare the data set again with overwrite=true"


def write_report(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write `report` with what else is to be known of `folder`; returns all of it."""
    files = {
        name: {"bytes": file_size(folder / name), "sha256": file_sha256(folder / name)}
        for name in (DROPPED_NAME, TEXT_NAME)
        if exists(folder / name)
    }
    report = {**report, "files": files}
    report["checksum"] = _checksum(report)
    write_durably(folder / REPORT_NAME, json.dumps(report, indent=2).encode())
    return report


def found_report(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, which may be damaged; None if there is none of a data set."""
    if not exists(folder / REPORT_NAME):
        return None
    try:
        report = json.loads(read_file(folder / REPORT_NAME))
    except UserError:
        raise
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and "fingerprint" in report and "document_lengths" in report else None


def check_report(folder: Path, report: dict[str, Any]) -> None:
    """Raises UserError if it is not what was written, as far as that can be told, or names other files than its own.

    A report of an earlier version has no checksum.
    """
    is_earlier = "checksum" not in report and "files" not in report
    if not is_earlier and report.get("checksum") != _checksum(report):
        raise UserError(f"{folder / REPORT_NAME} is damaged: its checksum does not match its contents; {_AGAIN}")
    files, splits = report.get("files", {}), report.get("splits")
    is_known = (
        isinstance(files, dict)
        and files.keys() <= {DROPPED_NAME, TEXT_NAME}
        and all(isinstance(of, dict) and of.keys() >= {"bytes", "sha256"} for of in files.values())
        and isinstance(splits, dict)
        and all(isinstance(of, dict) for of in splits.values())
    )
    if not is_known:
        raise UserError(f"{folder / REPORT_NAME} is wrong: its files or splits are not those of a report; {_AGAIN}")


def check_file(folder: Path, report: dict[str, Any], name: str, *, full: bool = True) -> int:
    """Compare a file beside the report with what it says; returns the size.  Raises UserError naming the file."""
    wanted = report["files"][name]
    size = file_size(folder / name)
    if size != wanted["bytes"]:
        raise UserError(f"{folder / name} has {size} bytes instead of {wanted['bytes']}; {_AGAIN}")
    if full and file_sha256(folder / name) != wanted["sha256"]:
        raise UserError(f"{folder / name} is damaged: its sha256 is not the one in {REPORT_NAME}; {_AGAIN}")
    return size


def in_words(report: dict[str, Any]) -> str:
    """The counts of each stage and of each split, a line each."""
    lines = []
    for name, counts in report["stages"].items():
        lines.append(f"{name:>10}: " + ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items()))
    for split, counts in report["splits"].items():
        parts = [f"{counts['num_tokens']:,} tokens"]
        if counts["num_documents"] is not None:
            each = counts["text_bytes"] / max(1, counts["num_tokens"])
            parts = [
                f"{counts['num_documents']:,} documents",
                f"{counts['text_bytes']:,} bytes of text",
                f"{parts[0]} ({each:.2f} bytes each)",
            ]
        if "num_labels" in counts:
            parts.append(labels_in_words(counts["num_labels"], counts["num_tokens"]))
        if "num_rows" in counts:
            parts.append(
                f"{counts['num_rows']:,} rows of {counts['seq_length']} with {counts['num_padding']:,} pad ids"
            )
        lines.append(f"{split:>10}: " + ", ".join(parts))
    return "\n".join(lines)


def labels_in_words(num_labels: int, num_tokens: int) -> str:
    """How many ids of a split are labels, where a mask says which."""
    return f"{num_labels:,} labels ({num_labels / max(1, num_tokens):.1%} of the tokens)"


def loss_in_words(of: Counter[str], lost: Counter[str]) -> str:
    """What the tokenizer does not give back: the counts `of` encoding, and the characters."""
    most = ", ".join(f"{character!a}" for character, _ in lost.most_common(5))
    whole = f", and nothing of {of['documents_lost']:,} more, which are left out" if of["documents_lost"] else ""
    return (
        f"warning: the tokenizer does not give back {of['bytes_lost']:,} bytes of text, {lost.total():,} "
        f"characters such as {most}, in {of['documents_with_lost_characters']:,} documents{whole}; bits per byte count "
        "only what it gives back. A byte-level tokenizer.file, or train_vocab_size, keeps everything"
    )


def left_out(stages: Mapping[str, Counter[str]]) -> str:
    """What was left out and why, as the end of a sentence."""
    why = {key: n for key, n in sorted((stages["sources"] + stages["clean"]).items()) if n and _LEFT_OUT.match(key)}
    if not why:
        return ""
    return " (left out: " + ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in why.items()) + ")"


def _checksum(report: dict[str, Any]) -> str:
    content = {key: value for key, value in report.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of the content.  Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
