"""The file metrics.jsonl of a run: one record a line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfm.files import read_file


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line that is none, such as a last one that a crash cut short, is left out.

    Raises UserError when the file cannot be read.
    """
    records = []
    for line in read_file(file).decode(errors="replace").split("\n"):
        with suppress(ValueError):
            records.append(parse_record(line))
    return records


def parse_record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("no record of a step")
    return record
