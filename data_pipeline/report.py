"""report.json: what a preparation did, and what it left beside the splits."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lfm.errors import UserError
from lfm.files import exists, file_size, open_file, read_file, write_durably

REPORT_NAME = "report.json"
DROPPED_NAME = "dropped.jsonl"
"""A few documents that each rule dropped, to be looked at."""
TEXT_NAME = "validation.txt"

_AGAIN = "restore it from a copy or prepare the data set again with overwrite=true"


def write_report(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write `report` with what else is to be known of `folder`; returns all of it."""
    files = {
        name: {"bytes": file_size(folder / name), "sha256": _sha256(folder / name)}
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
    """Raises UserError if it is not what was written; a report of an earlier version has nothing to tell that by."""
    is_earlier = "checksum" not in report and "files" not in report
    if not is_earlier and report.get("checksum") != _checksum(report):
        raise UserError(f"{folder / REPORT_NAME} is damaged: its checksum does not match its contents; {_AGAIN}")


def check_file(folder: Path, report: dict[str, Any], name: str, *, full: bool = True) -> int:
    """Compare a file beside the report with what it says; returns the size.  Raises UserError naming the file."""
    wanted = report["files"][name]
    size = file_size(folder / name)
    if size != wanted["bytes"]:
        raise UserError(f"{folder / name} has {size} bytes instead of {wanted['bytes']}; {_AGAIN}")
    if full and _sha256(folder / name) != wanted["sha256"]:
        raise UserError(f"{folder / name} is damaged: its sha256 is not the one in {REPORT_NAME}; {_AGAIN}")
    return size


def _checksum(report: dict[str, Any]) -> str:
    content = {key: value for key, value in report.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
