"""The picture of a set's result: held-out loss over tokens, FLOPs and seconds; bits per byte, with bands over seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from lfm.training.plots import drawn

_STYLES = ("-", "--", "-.", ":")


def picture(result: Mapping[str, Any]) -> bytes | None:
    """A PNG of a RESULT.json; None while no arm has a best rate."""
    curves = {arm["name"]: _curve(arm, result["runs"]) for arm in result["arms"]}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure, grid = plt.subplots(2, 2, figsize=(12, 8.4), dpi=110, layout="constrained")
    flops = {arm["name"]: arm["flops_per_token"] for arm in result["arms"]}
    colours = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
    looks = {
        name: {"color": colours[i % 10], "linestyle": _STYLES[i // 10 % len(_STYLES)]}
        for i, name in enumerate(arm["name"] for arm in result["arms"])
    }
    losses, by_flops, by_seconds, bits = grid.flat
    for name, curve in curves.items():
        look = looks[name]
        _draw(losses, curve, "tokens", "loss", name, look, band=True)
        _draw(by_flops, curve, "tokens", "loss", name, look, scale=flops[name])
        _draw(by_seconds, curve, "seconds", "loss", name, look)
        _draw(bits, curve, "tokens", "bits", name, look, band=True)
    labels = ("tokens", "training FLOPs", "seconds of training")
    for axes, label in zip((losses, by_flops, by_seconds), labels, strict=True):
        axes.set(xlabel=label, ylabel="held-out loss (nats per token)")
    bits.set(xlabel="tokens", ylabel="held-out bits per byte")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter())
    losses.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{result['name']}: each arm at its best rate, mean of its seeds (band: lowest to highest)", fontsize=10
    )
    return drawn(figure, "png")


def _curve(arm: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By validation: tokens, seconds, and of loss and bits per byte the values of the seeds at the best rate."""
    if arm["best_rate"] is None or arm["untrained"]:
        return []
    text = [run for run in runs if run["arm"] == arm["name"] and run["task"] == "text"]
    text = [run for run in text if run["held_out_loss"] is not None]
    whole = [run for run in text if run["rate"] == arm["best_rate"]]
    timed = [run for run in text if not run["speed"].get("shares_gpu") and _is_as_long(run, whole)] or whole
    points = []
    for found in zip(*(run["validation"] for run in whole), strict=False):
        place = len(points)
        seconds = statistics.fmean(run["speed"]["seconds_of_validations"][place] for run in timed)
        bits = [bits for _, _, bits in found if bits is not None]
        points.append({"tokens": found[0][0], "seconds": seconds, "loss": [loss for _, loss, _ in found], "bits": bits})
    return points


def _is_as_long(run: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    return all(len(run["validation"]) >= len(other["validation"]) for other in others)


def _draw(
    axes: Axes,
    curve: Sequence[Mapping[str, Any]],
    over: str,
    key: str,
    name: str,
    look: Mapping[str, Any],
    *,
    scale: float = 1.0,
    band: bool = False,
) -> None:
    points = [point for point in curve if point[key]]

    def values(reduce: Callable[[Sequence[float]], float]) -> list[float]:
        return [reduce(point[key]) for point in points]

    x = [scale * point[over] for point in points]
    axes.plot(x, values(statistics.fmean), label=name, linewidth=1.5, marker="o", markersize=2.5, **look)
    if band:
        axes.fill_between(x, values(min), values(max), color=look["color"], alpha=0.18, linewidth=0)
