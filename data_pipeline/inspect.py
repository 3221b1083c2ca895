"""What is in a data set: `python -m data_pipeline.inspect FOLDER [--html FILE]`.

Prints statistics; with --html, also writes one page that needs no other file: plots, samples of what was dropped, and
the first documents of the validation text.
"""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.prepare import DROPPED_NAME, REPORT_NAME
from lfm.errors import UserError, command

_SAMPLE_CHARACTERS = 6000

_SPLIT_TITLES = {
    "num_documents": "Documents",
    "num_tokens": "Tokens",
    "num_padding": "Pad positions",
    "num_rows": "Rows",
    "text_bytes": "Bytes of text",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
td, th { text-align: right; padding: 2px 10px; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
pre { white-space: pre-wrap; background: #f5f5f5; padding: 8px; font-size: 13px }
"""


def read_report(folder: Path) -> dict[str, Any]:
    """The report.json of a data set.  Raises UserError if there is none."""
    try:
        report = json.loads((folder / REPORT_NAME).read_bytes())
    except (OSError, ValueError):
        report = None
    if not (isinstance(report, dict) and "document_lengths" in report):
        raise UserError(f"{folder} holds no {REPORT_NAME} of data_pipeline.prepare; give the folder of a data set")
    return report


def tables(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    """The counts worth looking at: a title, and rows of a name and a count."""
    stages = report["stages"]
    clean, dedup = stages["clean"], stages["dedup"]
    prefix = "dropped_by_"
    dropped = [(key.removeprefix(prefix), n) for key, n in clean.items() if key.startswith(prefix)]
    copies = [(key.replace("_", " "), dedup.get(key, 0)) for key in ("duplicates", "near_duplicates")]
    lengths = [(f"{int(low):,}-{2 * int(low) - 1:,}", n) for low, n in report["document_lengths"].items()]
    found = [
        ("Bytes of text kept, by source", [(of["name"], of["bytes_kept"]) for of in report["sources"]]),
        ("Tokens by source", [(of["name"], of.get("tokens", 0)) for of in report["sources"]]),
        ("Documents by number of tokens", lengths),
        ("Documents dropped by each rule", dropped),
        ("Copies dropped", copies),
    ]
    if "pack" in stages:
        found.append(
            (f"Packing: {report['config']['packing']}", [(k.replace("_", " "), n) for k, n in stages["pack"].items()])
        )
    splits = report["splits"]
    for unit, title in _SPLIT_TITLES.items():
        found.append((title, [(split, of[unit]) for split, of in splits.items() if of.get(unit) is not None]))
    return [(title, rows) for title, rows in found if rows]


def as_text(report: dict[str, Any]) -> str:
    """The tables with a bar to each count."""
    lines = []
    for title, rows in tables(report):
        most = max(1, *(n for _, n in rows))
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}} {n:>15,} {'#' * round(30 * n / most)}" for name, n in rows), ""]
    return "\n".join(lines)


def as_page(report: dict[str, Any], folder: Path) -> str:
    """One page of HTML that refers to nothing outside it."""
    parts = [f"<title>{html.escape(folder.name)}</title><style>{_STYLE}</style><h1>{html.escape(folder.name)}</h1>"]
    for title, rows in tables(report):
        parts.append(f"<h2>{html.escape(title)}</h2>{_bars(rows)}")
    parts.append("<h2>Samples of what was dropped</h2>")
    for line in _text_of(folder / DROPPED_NAME).splitlines():
        sample = json.loads(line)
        like = f", like {sample['like']}" if sample["like"] else ""
        words = html.escape(f"{sample['rule']}: {sample['origin']}{like}")
        parts.append(f"<p>{words}</p><pre>{html.escape(sample['text'])}</pre>")
    text = _text_of(folder / "validation.txt", _SAMPLE_CHARACTERS)
    parts.append(f"<h2>Beginning of the validation text</h2><pre>{html.escape(text)}</pre>")
    return '<!DOCTYPE html><html lang="en"><meta charset="utf-8">' + "\n".join(parts) + "</html>\n"


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    """A table with a bar chart in SVG."""
    most = max(1, *(n for _, n in rows))
    lines = []
    for name, n in rows:
        bar = f'<svg width="300" height="14"><rect width="{300 * n / most:.1f}" height="14" fill="#4477aa"/></svg>'
        lines.append(f"<tr><td>{html.escape(name)}</td><td>{n:,}</td><td>{bar}</td></tr>")
    return f"<table>{''.join(lines)}</table>"


def _text_of(path: Path, num_bytes: int = -1) -> str:
    """The beginning of a file; nothing if it is not there, as validation.txt with validation=tail."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return file.read(num_bytes).decode(errors="ignore")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show what is in a data set that data_pipeline.prepare made.")
    parser.add_argument("folder", type=Path, help="the data set")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots and samples")
    flags = parser.parse_args(argv)
    report = read_report(flags.folder)
    print(as_text(report))
    if flags.html is not None:
        try:
            flags.html.write_text(as_page(report, flags.folder.absolute()))
        except OSError as error:
            raise UserError(f"--html {flags.html} cannot be written: {error.strerror}; choose another file") from None
        print(f"{flags.html} is written")


if __name__ == "__main__":
    main()
