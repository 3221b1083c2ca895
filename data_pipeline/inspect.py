"""What is in a data set: `python -m data_pipeline.inspect FOLDER [--html FILE]`.

Prints statistics; with --html, also writes one page that needs no other file: plots, samples of what was dropped, and
the first documents of the validation text.
"""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.report import DROPPED_NAME, REPORT_NAME, TEXT_NAME, check_file, check_report, found_report
from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, open_file, reason, shown, write_out

_SAMPLE_CHARACTERS = 6000

_SPLIT_TITLES = {
    "num_documents": "Documents",
    "num_tokens": "Tokens",
    "num_labels": "Labels, which a mask says",
    "num_padding": "Pad positions",
    "num_rows": "Rows",
    "text_bytes": "Bytes of text",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
td, th { text-align: right; padding: 2px 10px; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
p { overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: 8px; font-size: 13px }
"""


def read_report(folder: Path) -> dict[str, Any]:
    """The report.json of a data set.  Raises UserError if there is none, or it is damaged."""
    report = found_report(folder)
    if report is None:
        raise UserError(
            f"{shown(folder)} holds no {REPORT_NAME} of data_pipeline.prepare; give the folder of a data set"
        )
    check_report(folder, report)
    return report


class Table(NamedTuple):
    """Counts worth looking at."""

    title: str
    rows: list[tuple[str, list[int]]]
    """A name and a count for each column."""
    columns: tuple[str, ...] = ("",)
    bars: bool = True
    """The counts of all rows are of the same kind, so that bars can be compared."""


def tables(report: dict[str, Any]) -> list[Table]:
    """What as_text and as_page show, without tables that would be empty."""
    stages, splits, sources = report["stages"], report["splits"], report["sources"]
    clean, dedup = stages["clean"], stages["dedup"]
    of_splits = [(title, [of.get(unit) for of in splits.values()]) for unit, title in _SPLIT_TITLES.items()]
    if "num_labels" in next(iter(splits.values())):
        shares = [round(100 * of["num_labels"] / max(1, of["num_tokens"])) for of in splits.values()]
        of_splits.append(("Labels, % of the tokens", shares))
    found = [
        Table("Splits", [row for row in of_splits if None not in row[1]], columns=tuple(splits), bars=False),
        Table("Bytes of text kept, by source", [(of["name"], [of.get("bytes_kept", 0)]) for of in sources]),
        Table("Tokens, by source", [(of["name"], [of.get("tokens", 0)]) for of in sources]),
        Table(
            "Documents, by number of tokens",
            [(f"{int(low):,}-{2 * int(low) - 1:,}", [n]) for low, n in report["document_lengths"].items()],
        ),
        Table(
            "Documents dropped, by rule",
            [(key.removeprefix("dropped_by_"), [n]) for key, n in clean.items() if key.startswith("dropped_by_")]
            + [(key.replace("_", " "), [dedup.get(key, 0)]) for key in ("duplicates", "near_duplicates")],
        ),
    ]
    if "pack" in stages:
        packing = [(key.replace("_", " "), [n]) for key, n in stages["pack"].items()]
        found.append(Table(f"Packing: {report['config']['packing']}", packing, bars=False))
    return [table for table in found if table.rows]


def as_text(report: dict[str, Any]) -> str:
    """The tables, with a bar to each count that can be compared with those above it."""
    lines = []
    for table in tables(report):
        width = max(len(name) for name, _ in table.rows)
        lines.append(table.title)
        if len(table.columns) > 1:
            lines.append(f"  {'':<{width}}" + "".join(f" {column:>15}" for column in table.columns))
        for (name, counts), share in zip(table.rows, _shares(table), strict=True):
            lines.append(f"  {name:<{width}}" + "".join(f" {n:>15,}" for n in counts) + " " + "#" * round(30 * share))
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def as_page(report: dict[str, Any], folder: Path) -> str:
    """One page of HTML that refers to nothing outside it."""
    name = html.escape(shown(folder.name))
    parts = [f"<title>{name}</title><style>{_STYLE}</style><h1>{name}</h1>"]
    parts += [f"<h2>{html.escape(table.title)}</h2>{_as_html(table)}" for table in tables(report)]
    samples = [json.loads(line) for line in _text_of(folder, report, DROPPED_NAME).splitlines()]
    if samples:
        parts.append("<h2>Samples of what was dropped</h2>")
    for sample in samples:
        like = f", like {sample['like']}" if sample["like"] else ""
        origin = html.escape(f"{sample['origin']}{like}")
        parts.append(f"<p><b>{sample['rule']}</b> {origin}</p><pre>{html.escape(sample['text'])}</pre>")
    text = _text_of(folder, report, TEXT_NAME, _SAMPLE_CHARACTERS)
    if text:
        parts.append(f"<h2>Beginning of the validation text</h2><pre>{html.escape(text)}</pre>")
    return '<!DOCTYPE html><html lang="en"><meta charset="utf-8">' + "\n".join(parts) + "</html>\n"


def _as_html(table: Table) -> str:
    """A table, with a bar chart in SVG beside it."""
    lines = []
    if len(table.columns) > 1:
        lines.append("<tr>" + "".join(f"<th>{html.escape(column)}</th>" for column in ("", *table.columns)) + "</tr>")
    for (name, counts), share in zip(table.rows, _shares(table), strict=True):
        cells = "".join(f"<td>{n:,}</td>" for n in counts)
        bar = f'<svg width="300" height="14"><rect width="{300 * share:.1f}" height="14" fill="#4477aa"/></svg>'
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}{f'<td>{bar}</td>' if table.bars else ''}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _shares(table: Table) -> list[float]:
    """The length of each row's bar as a share of the longest; 0 where there are none."""
    most = max(1, *(counts[0] for _, counts in table.rows))
    return [counts[0] / most if table.bars else 0.0 for _, counts in table.rows]


def _text_of(folder: Path, report: dict[str, Any], name: str, num_bytes: int = -1) -> str:
    """The beginning of a file; nothing if it is not there, as validation.txt with validation=tail."""
    if not exists(folder / name) and name not in report.get("files", {}):
        return ""
    if "files" in report:  # an earlier version does not say what they held
        check_file(folder, report, name)
    with open_file(folder / name) as file:
        return file.read(num_bytes).decode(errors="ignore")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show what is in a data set that data_pipeline.prepare made.")
    parser.add_argument("folder", type=path_flag, help="the data set")
    parser.add_argument("--html", type=path_flag, metavar="FILE", help="also write a page with plots and samples")
    flags = parser.parse_args(argv)
    report = read_report(flags.folder)
    print(as_text(report))
    if flags.html is not None:
        page = as_page(report, flags.folder.absolute())
        try:
            write_out(flags.html, page.encode())
        except OSError as error:
            raise UserError(
                f"--html {shown(flags.html)} cannot be written: {reason(error)}; choose another file"
            ) from None
        print(f"{shown(flags.html)} is written")


if __name__ == "__main__":
    main()
