"""What `lfm eval` found, as tables and as JSON: texts and tasks by checkpoint, and differences from the first one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lfm.evaluation.intervals import Interval
from lfm.evaluation.task_result import TaskResult, differences
from lfm.evaluation.text import Document, TextScore, difference, together


@dataclass
class Evaluated:
    """What was found of one checkpoint."""

    name: str
    checkpoint: Path
    step: int
    kind: str
    num_parameters: int
    held_out: dict[str, Any] | None = None
    """As JSON values."""
    texts: list[TextScore] = field(default_factory=list)
    """One for each document."""
    tasks: dict[str, TaskResult] = field(default_factory=dict)


def tables(found: Sequence[Evaluated], documents: Sequence[Document]) -> Iterator[str]:
    """Lines; none where neither texts nor tasks were scored."""
    heads = [one.name for one in found]
    if documents:
        rows = [["text", "bytes", *(f"{head}: {what}" for head in heads for what in ("perplexity", "bits/byte"))]]
        for name, scores in _by_text(found):
            cells = [cell for score in scores for cell in (_number(score.perplexity, 3), _number(score.bits_per_byte))]
            rows.append([name, f"{scores[0].num_bytes:,}", *cells])
        yield from _aligned(rows)
        for name, scores in _by_text(found):
            if any(score.lost for score in scores):
                yield f"no bits per byte of {name}: a tokenizer does not give all of its characters back"
    if any(one.tasks for one in found):
        yield from _aligned([["task", "documents", "metric", *heads], *_task_rows(found)])
    compared = list(_differences(found, documents))
    if compared:
        yield "difference from the first, 95 % interval over documents or stretches of text, paired:"
        yield from _aligned(
            [
                [
                    each["of"],
                    each["metric"],
                    f"{each['checkpoint']} - {each['from']}",
                    f"{each['estimate']:+.4f}",
                    f"[{each['low']:+.4f}, {each['high']:+.4f}]",
                    "" if each["excludes_zero"] else "not told apart",
                ]
                for each in compared
            ]
        )


def report(found: Sequence[Evaluated], documents: Sequence[Document], settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON values."""
    return {
        "settings": settings,
        "checkpoints": [
            {
                "name": one.name,
                "checkpoint": str(one.checkpoint),
                "step": one.step,
                "kind": one.kind,
                "parameters": one.num_parameters,
                "held_out": one.held_out,
                "texts": [score.record() for score in one.texts],
                "texts_together": together(one.texts).record() if one.texts else None,
                "tasks": {name: result.record() for name, result in one.tasks.items()},
            }
            for one in found
        ],
        "differences": list(_differences(found, documents)),
    }


def _by_text(found: Sequence[Evaluated]) -> Iterator[tuple[str, list[Any]]]:
    for place in range(len(found[0].texts)):
        yield found[0].texts[place].name, [one.texts[place] for one in found]
    if len(found[0].texts) > 1:
        yield "together", [together(one.texts) for one in found]


def _task_rows(found: Sequence[Evaluated]) -> Iterator[list[str]]:
    for name, first in found[0].tasks.items():
        for metric in first.metrics:
            cells = []
            for one in found:
                value, error = one.tasks[name].metrics[metric], one.tasks[name].standard_error(metric)
                cells.append(f"{value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
            yield [name, f"{first.num_documents:,}", metric, *cells]


def _differences(found: Sequence[Evaluated], documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    first, sizes = found[0], [document.sizes for document in documents]
    if len(sizes) > 1:
        sizes.append(np.concatenate(sizes))
    for number, other in enumerate(found[1:], start=1):
        for (name, scores), blocks in zip(_by_text(found), sizes, strict=True):
            interval = difference(scores[0], scores[number], blocks)
            if interval is not None:
                yield _record(name, "bits_per_byte", first, other, interval)
        for name, result in first.tasks.items():
            for metric, interval in differences(result, other.tasks[name]).items():
                yield _record(name, metric, first, other, interval)


def _record(of: str, metric: str, first: Evaluated, other: Evaluated, interval: Interval) -> dict[str, Any]:
    return {
        "of": of,
        "metric": metric,
        "checkpoint": other.name,
        "from": first.name,
        **interval._asdict(),
        "excludes_zero": interval.excludes_zero,
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()
