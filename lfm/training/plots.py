"""Curves of runs, drawn from their metrics.jsonl: the loss plot of a run folder, and the page of `lfm plot`."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lfm.files import write_durably
from lfm.training.metrics_file import read_metrics

_TRAIN, _VALIDATION, _LR = "#3567a6", "#d1495b", "#9aa5b1"
_RUNS = ("#3567a6", "#d1495b", "#3a8f5c", "#c98a1b", "#7a5aa6", "#5c6b73", "#a6446f", "#2c8f99")
_MOST_POINTS = 2000
"""Of a curve: a longer one is thinned, evenly."""


def plot_loss(metrics: Path, image: Path) -> None:
    """Training and validation cross entropy over tokens, with the learning rate behind; replaces `image` whole."""
    records = read_metrics(metrics)
    train = [r for r in records if "cross_entropy" in r]
    validation = [r for r in records if "validation_loss" in r]
    if not train:
        return
    figure, axis = plt.subplots(figsize=(8, 4.8), dpi=150)
    tokens = [r["tokens"] for r in train]
    losses = [r["cross_entropy"] for r in train]
    rate = axis.twinx()
    rate.fill_between(tokens, [r["lr"] for r in train], color=_LR, alpha=0.15, linewidth=0)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate", color=_LR)
    rate.tick_params(colors=_LR)
    axis.plot(tokens, losses, color=_TRAIN, alpha=0.25, linewidth=1)
    axis.plot(tokens, _smooth(losses), color=_TRAIN, linewidth=1.8, label="training (smoothed)")
    if validation:
        last = validation[-1]["validation_loss"]
        axis.plot(
            [r["tokens"] for r in validation],
            [r["validation_loss"] for r in validation],
            "o-",
            color=_VALIDATION,
            markersize=4,
            label=f"validation (last {last:.3f})",
        )
    axis.set_zorder(rate.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.set_ylabel("cross entropy (nats per token)")
    axis.set_title(metrics.parent.name)
    axis.legend(frameon=False)
    _over_tokens(axis)
    rate.spines["top"].set_visible(False)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    write_durably(image, drawn(figure, "png"))


@dataclass(frozen=True)
class Curves:
    """A run's records, under the name that its curves have."""

    name: str
    records: list[dict[str, Any]]

    def of(self, value: Callable[[dict[str, Any]], Any]) -> tuple[list[float], list[float]]:
        """Tokens, and what `value` gives of the records there; what is no finite number is left out."""
        found = [(number(r.get("tokens")), _or_none(value, r)) for r in self.records]
        points = [(tokens, y) for tokens, y in found if tokens is not None and y is not None]
        thinned = points[:: max(1, len(points) // _MOST_POINTS)]
        return [tokens for tokens, _ in thinned], [y for _, y in thinned]


def number(value: Any) -> float | None:
    """The finite number that a record has there; None where it has none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None


def _or_none(value: Callable[[dict[str, Any]], Any], record: dict[str, Any]) -> float | None:
    """Of a record of another form than `value` reads: None."""
    try:
        return number(value(record))
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
        return None


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    draw: Callable[[Axes, Curves, str], bool]
    """Draws a run in a colour; whether it had anything to draw."""


def figures(runs: Sequence[Curves]) -> Iterator[tuple[str, Figure]]:
    """A figure for each panel that any of the runs has something for, with its title.  Whoever takes it closes it."""
    for panel in PANELS:
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        colours = [_RUNS[i % len(_RUNS)] for i in range(len(runs))]
        shown = [panel.draw(axes, run, colour) for run, colour in zip(runs, colours, strict=True)]
        if not any(shown):
            plt.close(figure)
            continue
        axes.set(title=panel.title, ylabel=panel.unit)
        _over_tokens(axes)
        lines = [axes.plot([], [], color=colour)[0] for colour, has in zip(colours, shown, strict=True) if has]
        legend = axes.legend(lines, ["-"] * len(lines), frameon=False, fontsize=8)
        names = [run.name for run, has in zip(runs, shown, strict=True) if has]
        for text, name in zip(legend.get_texts(), names, strict=True):
            # Given as labels, names that begin with _ would be hidden, and those with $ read as formulas.
            text.set(text=name, parse_math=False)
        yield panel.title, figure


def together(runs: Sequence[Curves]) -> bytes:
    """All panels as one PNG image."""
    images = [plt.imread(io.BytesIO(drawn(figure, "png"))) for _, figure in figures(runs)]
    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for axes, image in zip(grid.flat, [*images, *[None] * (rows * columns - len(images))], strict=True):
        axes.axis("off")
        if image is not None:
            axes.imshow(image)
    return drawn(figure, "png")


def drawn(figure: Figure, kind: str) -> bytes:
    """The figure as a file of this kind; it is closed."""
    file = io.BytesIO()
    # Letters stay letters in an SVG, and ids, which a page of several must not share, are the panel's.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.axes[0].get_title()}):
        figure.savefig(file, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None})
    plt.close(figure)
    return file.getvalue()


def _loss(axes: Axes, run: Curves, colour: str) -> bool:
    tokens, losses = run.of(lambda r: r.get("cross_entropy"))
    axes.plot(tokens, losses, color=colour, alpha=0.2, linewidth=1)
    axes.plot(tokens, _smooth(losses), color=colour, linewidth=1.6)
    held_out = run.of(lambda r: r.get("validation_loss"))
    axes.plot(*held_out, "o", color=colour, markersize=4)
    return bool(tokens or held_out[0])


def _line(key: str, style: str = "-") -> Callable[[Axes, Curves, str], bool]:
    def draw(axes: Axes, run: Curves, colour: str) -> bool:
        tokens, values = run.of(lambda r: r.get(key))
        axes.plot(tokens, values, style, color=colour, linewidth=1.3, markersize=4)
        return bool(tokens)

    return draw


def _layers(key: str) -> Callable[[Axes, Curves, str], bool]:
    """The mean over layers, within their range."""

    def draw(axes: Axes, run: Curves, colour: str) -> bool:
        def over(reduce: Callable[[list[float]], float]) -> tuple[list[float], list[float]]:
            def value(record: dict[str, Any]) -> float | None:
                found = [number(of_layer) for of_layer in record[key].values()]
                values = [of_layer for of_layer in found if of_layer is not None]
                return reduce(values) if values and len(values) == len(found) else None

            return run.of(lambda r: value(r) if r.get(key) else None)

        tokens, means = over(lambda values: sum(values) / len(values))
        axes.plot(tokens, means, color=colour, linewidth=1.3)
        axes.fill_between(tokens, over(min)[1], over(max)[1], color=colour, alpha=0.15, linewidth=0)
        return bool(tokens)

    return draw


def _load(axes: Axes, run: Curves, colour: str) -> bool:
    """Of the fullest expert over the mean of its layer: mean over layers, and the worst one."""

    def uneven(record: dict[str, Any]) -> list[float]:
        return [max(shares) * len(shares) / max(1e-12, sum(shares)) for shares in record["expert_load"]]

    tokens, means = run.of(lambda r: sum(uneven(r)) / len(r["expert_load"]) if r.get("expert_load") else None)
    axes.plot(tokens, means, color=colour, linewidth=1.3)
    axes.plot(*run.of(lambda r: max(uneven(r)) if r.get("expert_load") else None), ":", color=colour, linewidth=1)
    return bool(tokens)


def _tasks(axes: Axes, run: Curves, colour: str) -> bool:
    """A line a task, named at its end: acc_norm where the task has it, else acc or exact_match."""

    def value(record: dict[str, Any], name: str) -> float | None:
        scores = (record.get("tasks") or {}).get(name) or {}
        return next((scores[metric] for metric in ("acc_norm", "acc", "exact_match") if metric in scores), None)

    names = sorted({name for record in run.records for name in record.get("tasks") or {}})
    is_drawn = False
    for name, style in zip(names, itertools.cycle(("-", "--", "-.", ":"))):
        tokens, values = run.of(lambda r, name=name: value(r, name))
        if tokens:
            axes.plot(tokens, values, style, color=colour, linewidth=1.3, marker="o", markersize=3)
            end = (tokens[-1], values[-1])
            axes.annotate(
                name, end, xytext=(3, 3), textcoords="offset points", fontsize=7, color=colour, parse_math=False
            )
            is_drawn = True
    return is_drawn


PANELS = (
    Panel("loss: training (line) and held out (points)", "nats per token", _loss),
    Panel("held-out bits per byte of text", "bits", _line("validation_bits_per_byte", "o-")),
    Panel("tasks", "share right", _tasks),
    Panel("throughput", "tokens/s", _line("tokens_per_second")),
    Panel("MFU", "share of the data sheet", _line("mfu")),
    Panel("gradient norm", "", _line("grad_norm")),
    Panel("learning rate", "", _line("lr")),
    Panel("load of the fullest expert over the mean: layers (line), worst layer (dots)", "", _load),
    Panel("entropy of the routers: mean and range of layers", "nats", _layers("router_entropy")),
    Panel("cosine between two inputs of a router: mean and range of layers", "", _layers("router_input_cosine")),
    Panel("reservoirs: saturated units, mean and range of layers", "share", _layers("reservoir_saturation")),
    Panel("reservoirs: residual of the chunks, mean and range of layers", "", _layers("reservoir_residual")),
    Panel("reservoirs: mean gain, mean and range of layers", "", _layers("reservoir_gain")),
    Panel("loss scale of float16", "", _line("loss_scale")),
    Panel("memory of the fullest process", "GiB", _line("memory_gib")),
)


def _over_tokens(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter())


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    weight = 1 - 1 / max(2, len(values) // 20)
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
