"""Waterfalls side by side, as horizontal bars."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.model.parts import PARTS

COLOURS = {
    "attention": "#2f6db5",
    "projections": "#6fa3d8",
    "router": "#1d7a6c",
    "permutation": "#6bbfae",
    "experts": "#3a8f5c",
    "feed-forward": "#3a8f5c",
    "liquid": "#7a5aa6",
    "norms": "#a98fc9",
    "embedding": "#8a6d3b",
    "head": "#c98a1b",
    "accumulation": "#b9a77a",
    "weight gradients": "#8fb8de",
    "optimizer": "#5c6b73",
    "other": "#9aa5b1",
    "exchange": "#d1495b",
    "collectives": "#e0803c",
    "bubble": "#f0b7a4",
    "data wait": "#333333",
    "host gaps": "#e2e2e2",
}


def plot_waterfalls(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """`bars`: milliseconds by part of each named step, the first at the top."""
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(bars) + 1.9), layout="constrained")
    for index, parts in enumerate(bars.values()):
        left = 0.0
        for part in PARTS:
            if not any(each[part] for each in bars.values()):
                continue
            axes.barh(index, parts[part], left=left, color=COLOURS[part], label=part if index == 0 else None)
            left += parts[part]
        axes.text(left, index, f" {left:,.0f} ms", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
