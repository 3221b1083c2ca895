"""Loss curve of a run, drawn from its metrics.jsonl."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from lfm.files import write_durably
from lfm.training.metrics_file import read_metrics

_TRAIN, _VALIDATION, _LR = "#3567a6", "#d1495b", "#9aa5b1"


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
    axis.set_xlabel("tokens")
    axis.set_ylabel("cross entropy (nats per token)")
    axis.set_title(metrics.parent.name)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    axis.spines["top"].set_visible(False)
    rate.spines["top"].set_visible(False)
    axis.xaxis.set_major_formatter(EngFormatter())
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    image.parent.mkdir(parents=True, exist_ok=True)
    write_durably(image, drawn.getvalue())


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    weight = 1 - 1 / max(2, len(values) // 20)
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
