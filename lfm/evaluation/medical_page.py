"""The report of medical mode as one HTML page with its plots inside."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfm.medical.selective import NO_DEVICE, percent

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
.wide { overflow-x: auto; } .warn { border-left: 4px solid #c33; padding-left: 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2em .7em; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; }
.panels svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
"""
_SHOWN = ("ece", "ace", "brier", "nll", "auroc", "risk_coverage_area", "coverage_at_5_percent_risk")
_SHOWN += ("selective_accuracy_at_0.85", "coverage_at_0.85")
_WEIGHTS = ("head_weight", "answer_weight", "offset")


def page(title: str, found: Mapping[str, Any], evidence: str = "") -> str:
    """`found` as `lfm.evaluation.medical.report` makes it; `evidence` is HTML of some questions."""
    measures = found["measures"]
    rows = [[name, *(_interval(of[key]) for key in _SHOWN)] for name, of in measures.items()]
    certificate, v = found["certificate"], found["violations"]
    threshold = certificate["threshold"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p class=warn>{html.escape(NO_DEVICE)} Nothing here is clinical evidence.</p>",
        *(f"<p>{html.escape(line)}</p>" for line in found.get("data_notes", ())),
        _counts(found),
        "<h2>How sure, and how right: test questions, 95 % bootstrap intervals over groups</h2>",
        _table(["", *(key.replace("_", " ") for key in _SHOWN)], rows),
        "<p>ECE and ACE grow where questions repeat, as in resamples: intervals of small ones may lie above them.</p>",
        "<h2>Calibration</h2>",
        _table(
            ["head", "weight (1 / temperature)", "weight of the answer's log-odds", "offset"],
            [[head, *(_number(of[key]) for key in _WEIGHTS)] for head, of in found["scalings"].items()],
        ),
        "<h2>Differences of the head from the others (paired)</h2>",
        _table(
            ["head minus", "auroc", "nll", "brier", "risk coverage area"],
            [
                [name, *(_interval(of[key], "+.4f") for key in ("auroc", "nll", "brier", "risk_coverage_area"))]
                for name, of in found["differences_from_head"].items()
            ],
        ),
        f"<div class=panels>{''.join(f'<figure>{svg}</figure>' for svg in plots(found))}</div>",
        "<h2>Thresholds</h2>",
        _table(
            ["threshold", "value", "coverage", "answered", "wrong", "risk"],
            [
                _selected("safety (asked for)", found["safety_threshold"], found["at_safety_threshold"]),
                _selected("certified", threshold, found["at_certified_threshold"]),
                _selected("applied, the stricter", found["applied_threshold"], found["at_applied_threshold"]),
            ],
        ),
        f"<p>Certificate: risk at most {percent(certificate['risk'])} with confidence "
        f"{percent(1 - certificate['delta'])}, from "
        f"{certificate['questions']:,} calibration questions, one of a group: {certificate['answered']:,} answered, "
        f"{certificate['wrong']} wrong. It is of a new group's question drawn as those were.</p>",
        "<h2>How often the certificate fails</h2>",
        _table(
            ["", "splits", "certified", "violated", "rate", "allowed", "mean coverage", "mean risk"],
            [
                _violations("one question a group", v),
                _violations(
                    "questions of a group as independent (not valid)",
                    found["violations_if_questions_of_a_group_were_independent"],
                ),
            ],
        ),
    ]
    if "shifted" in found:
        s = found["shifted"]
        parts += [
            f"<h2>Shifted questions ({html.escape(', '.join(s['sources']))}): the guarantee is void</h2>",
            _table(
                ["questions", "accuracy", "ece", "auroc", "risk at the certified threshold", "above the certified by"],
                [
                    [
                        f"{found['questions']['shifted']:,}",
                        _number(found["accuracy"]["shifted"]),
                        _number(s["ece"]),
                        _number(s["auroc"]),
                        _number(s["at_certified_threshold"]["risk"]),
                        _number(s["risk_above_the_certified"], "+.4f"),
                    ]
                ],
            ),
        ]
    for key, what in {
        "by_source": "By set",
        "by_kind": "By type of question",
        "by_specialty": "By specialty (of classification sets the right label, on which no calibration conditions)",
        "by_answer": "By answer given",
    }.items():
        parts += [f"<h2>{what}</h2>", _broken_down(found[key])]
    if found.get("evidence"):
        parts += [
            "<h2>Evidence: are the spans that moved the answer what it rests on?</h2>",
            _faithful(found["evidence"]),
        ]
    return "".join([*parts, evidence, "</html>"])


def plots(found: Mapping[str, Any]) -> list[str]:
    """Reliability, risk and coverage, AUROC: SVG."""
    from matplotlib.figure import Figure

    figures = []
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    for name, bins in found["reliability"].items():
        if len(bins) > 1:
            bold = name == "head"
            x, y = [b["sureness"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, marker="o", ms=3, lw=2 if bold else 0.8, alpha=1 if bold else 0.6, label=name)
    axes.set(xlabel="probability of being right", ylabel="share that is right", title="Reliability, 15 equal-mass bins")
    axes.legend(fontsize=6)
    figures.append(figure)
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in found["risk_coverage"].items():
        bold = name == "head"
        x, y = zip(*curve, strict=True)
        axes.plot(
            x, y, lw=2 if bold else 0.8, alpha=1 if bold else 0.6, label=name, marker="." if len(x) == 1 else None
        )
    axes.axhline(found["certificate"]["risk"], color="0.6", ls=":", lw=1)
    axes.set(xlabel="share answered", ylabel="share of the answers that is wrong", title="Risk and coverage")
    axes.legend(fontsize=6)
    figures.append(figure)
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    names = [name for name, of in found["measures"].items() if of["auroc"][0] is not None]
    values = [found["measures"][name]["auroc"] for name in names]
    # A percentile interval need not hold the estimate.
    errors = [[0.0 if v[1] is None else max(0.0, v[0] - v[1]) for v in values]]
    errors.append([0.0 if v[2] is None else max(0.0, v[2] - v[0]) for v in values])
    left = min([0.4, *(v[0] - low for v, low in zip(values, errors[0], strict=True))])
    axes.barh(names, [v[0] for v in values], xerr=errors, color="#5b8fc7")
    axes.axvline(0.5, color="0.6", ls=":", lw=1)
    axes.set(xlabel="AUROC of being right", xlim=(left, 1.0), title="Telling right from wrong")
    axes.invert_yaxis()
    figures.append(figure)
    return [_svg(figure) for figure in figures]


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _counts(found: Mapping[str, Any]) -> str:
    heads = ["part", "questions", "groups", "accuracy"]
    parts = found["questions"]
    return _table(
        heads,
        [
            [part, f"{parts[part]:,}", f"{found['groups'][part]:,}", _number(found["accuracy"][part])]
            for part in ("calibration", "test", "shifted")
            if part in parts
        ],
    )


def _selected(name: str, threshold: float | None, at: Mapping[str, Any]) -> list[str]:
    value = "none: nothing is answered" if threshold is None else f"{threshold:.4f}"
    return [name, value, f"{at['coverage']:.3f}", f"{at['answered']:,}", f"{at['wrong']:,}", _number(at["risk"])]


def _violations(name: str, v: Mapping[str, Any]) -> list[str]:
    return [
        name,
        str(v["splits"]),
        str(v["certified"]),
        str(v["violated"]),
        f"{v['rate']:.3f}",
        f"{v['allowed']:.3f}",
        _number(v["mean_coverage"]),
        _number(v["mean_risk"]),
    ]


def _broken_down(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None has enough questions.</p>"
    keys = ("accuracy", "mean_probability", "ece", "ece_by_chance", "auroc")
    keys += ("selective_accuracy_at_0.85", "coverage_at_0.85")
    cells = [
        [
            *(row["name"], f"{row['questions']:,}"),
            *(_number(row[key]) for key in keys),
            f"{row['at_certified_threshold']['answered']:,}",
            _number(row["at_certified_threshold"]["risk"]),
        ]
        for row in rows
    ]
    heads = ["", "questions", *(key.replace("_", " ") for key in keys), "answered, certified", "wrong of these"]
    return _table(heads, cells)


def _faithful(evidence: Mapping[str, Any]) -> str:
    if not evidence.get("questions"):
        return "<p>No question has two spans.</p>"
    rows = []
    for method in evidence["comprehensiveness"]:
        rows.append(
            [
                {"drive": "gradient x drive (the evidence)"}.get(method, method),
                _interval(evidence["comprehensiveness"][method], "+.4f"),
                _interval(evidence["sufficiency"][method], "+.4f"),
                _interval(evidence["comprehensiveness_of_drive_less_that_of"].get(method), "+.4f"),
            ]
        )
    heads = ["spans chosen by", "comprehensiveness (more is better)", "sufficiency (less is better)"]
    return f"<p>{evidence['questions']} questions.</p>" + _table([*heads, "comprehensiveness: drive minus this"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class=wide><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _interval(estimate: Sequence[float | None] | None, form: str = ".4f") -> str:
    if estimate is None or estimate[0] is None:
        return "-"
    value, low, high = estimate
    return format(value, form) if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"
