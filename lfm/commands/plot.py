"""Plot: `lfm plot runs/A [runs/B ...]`: curves of runs in one picture and one page that needs nothing but a browser."""

import argparse
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lfm.config import dotted, parse_yaml, path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import read_file, refusing, shown, write_durably

if TYPE_CHECKING:
    from lfm.training.plots import Curves

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line); padding: .25em .8em; text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; }
.panels svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
"""


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss, throughput, expert load and reservoirs of runs.")
    parser.add_argument("runs", nargs="+", type=path_flag, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=path_flag, metavar="DIR", help="where plot.png and plot.html go; default: RUN/plots, or plots"
    )
    flags = parser.parse_args()
    runs = [Path(run) for run in flags.runs]
    repeated = next((run for run in runs if runs.count(run) > 1), None)
    if repeated is not None:
        raise UserError(f"{shown(repeated)} is named twice; name each run once")
    curves = [_read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    from lfm.training.plots import together

    folder = Path(flags.out) if flags.out else runs[0] / "plots" if len(runs) == 1 else Path("plots")
    image, page = folder / "plot.png", folder / "plot.html"
    content = _page(runs, curves)
    with refusing("give another folder with --out DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(image, together(curves))
        write_durably(page, content.encode())
    print(f"{image}\n{page}")


def _names(runs: list[Path]) -> list[str]:
    """The folders' own names, with as much of the path before as tells them apart; bytes that are no text escaped."""
    parts = [[_plain(part) for part in run.resolve().parts] for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def _plain(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _read(run: Path, name: str) -> "Curves":
    from lfm.training.metrics_file import read_metrics
    from lfm.training.plots import Curves

    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{shown(run)} has no metrics.jsonl; name a run folder, which `lfm train` makes under runs/")
    records = read_metrics(file)
    curves = Curves(name, records)
    if not curves.of(lambda record: record.get("cross_entropy"))[0]:
        raise UserError(f"{shown(file)} has no record of a step yet; train on, or log more often (logging.every_steps)")
    return curves


def _page(runs: list[Path], curves: "list[Curves]") -> str:
    from lfm.training.plots import drawn, figures

    configs = [_config(run) for run in runs]
    panels = [f"<figure>{_inline(drawn(figure, 'svg'))}</figure>" for _, figure in figures(curves)]
    title = html.escape(", ".join(each.name for each in curves))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        f"<div class=wide>{_table(['', *(each.name for each in curves)], _facts(curves))}</div>",
        f"<div class=panels>{''.join(panels)}</div>",
    ]
    if len(runs) > 1:
        keys = sorted({key for config in configs for key in config})
        rows = [[key, *(config.get(key, "") for config in configs)] for key in keys]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        parts.append("<h2>What their configurations differ in</h2>")
        parts.append(f"<div class=wide>{_table(['key', *(each.name for each in curves)], rows)}</div>")
    elif configs[0]:
        parts.append("<h2>Configuration</h2>")
        parts.append(f"<div class=wide>{_table(['key', 'value'], [[*item] for item in configs[0].items()])}</div>")
    return "".join(parts)


def _inline(svg: bytes) -> str:
    """The picture alone, without the lines around it and the metadata, which name outside resources."""
    text = svg.decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _facts(curves: "list[Curves]") -> list[list[str]]:
    from lfm.training.plots import number

    def found(key: str) -> list[list[float]]:
        return [[n for r in each.records if (n := number(r.get(key))) is not None] for each in curves]

    def last(key: str, form: str) -> list[str]:
        return [format(values[-1], form) if values else "" for values in found(key)]

    def best(key: str, form: str) -> list[str]:
        return [format(min(values), form) if values else "" for values in found(key)]

    rows = [
        ["steps", *last("step", ",.0f")],
        ["tokens", *last("tokens", ",.0f")],
        ["last loss (nats)", *last("cross_entropy", ".4f")],
        ["best held-out loss (nats)", *best("validation_loss", ".4f")],
        ["best held-out bits per byte", *best("validation_bits_per_byte", ".4f")],
        ["tokens/s, last", *last("tokens_per_second", ",.0f")],
        ["updates skipped", *last("skipped_updates", ",.0f")],
    ]
    return [row for row in rows if any(row[1:])]


def _config(run: Path) -> dict[str, str]:
    """Dotted key -> value of the run's resolved configuration; empty where it is none."""
    try:
        return {
            _plain(key): _plain(value if isinstance(value, str) else json.dumps(value))
            for key, value in dotted(parse_yaml(read_file(run / "config.yaml").decode()))
        }
    except (UserError, TypeError, ValueError, RecursionError):
        return {}
