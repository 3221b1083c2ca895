"""Record runs of presets to their ends: `python benchmarks/trainings.py RUN... --text WORDS [--ids N]`.

Held-out losses, speed and what the model writes go to benchmarks/results/trainings.json, in place of what is there
under the run's name; `benchmarks/table.py` makes a table and docs/trainings.png of all.
"""

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import listed, read_file, write_durably
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig

RECORDED = Path(__file__).parent / "results/trainings.json"
IMAGE = Path(__file__).resolve().parents[1] / "docs/trainings.png"


def recorded() -> list[dict[str, Any]]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))["runs"] if RECORDED.exists() else []


def found_in(folder: Path, text: str, ids: int | None) -> dict[str, Any]:
    """Raises UserError for a run that was not validated at its end."""
    run, records = RunConfig.load(folder / "config.yaml"), read_metrics(folder / "metrics.jsonl")
    held_out = [record for record in records if "validation_loss" in record]
    steps = [record for record in records if "tokens_per_second" in record]
    if not held_out or not steps or held_out[-1]["step"] < run.training.steps:
        raise UserError(f"{folder} is not trained and validated to its last step, {run.training.steps}")
    samples = listed(folder / "samples")
    environment = json.loads(read_file(folder / "environment.json"))
    # This machine may have another device than the run had.
    dtype = "bfloat16" if run.training.dtype == "auto" and environment["gpu"] else str(run.dtype)
    return {
        "name": run.name,
        "kind": run.model.kind,
        "text": text,
        "ids": ids,
        "parameters": run.model.count_parameters().total,
        "dtype": dtype.removeprefix("torch."),
        "lr": run.optimizer.lr,
        "tokens": held_out[-1]["tokens"],
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps),
        "held_out": [[r["tokens"], r["validation_loss"], r.get("validation_bits_per_byte")] for r in held_out],
        "sample": read_file(max(samples)).decode() if samples else "",
        "date": date.fromtimestamp(steps[-1]["time"]).isoformat(),
        "environment": {key: environment[key] for key in ("gpu", "versions", "commit")},
    }


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=110, layout="constrained")
    for run in runs:
        tokens, losses, _ = zip(*run["held_out"], strict=True)
        axes.plot(tokens, losses, marker="o", markersize=2.5, linewidth=1.5, label=f"{run['name']}: {run['text']}")
    axes.set(xlabel="tokens", ylabel="held-out loss (nats per token)", xscale="log")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower left")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Record runs of presets to their ends.")
    parser.add_argument("runs", nargs="+", type=path_flag, metavar="RUN")
    parser.add_argument("--text", required=True, help="what they were trained on, in a few words")
    parser.add_argument("--ids", type=int, metavar="N", help="that the training part holds, for how often it was read")
    flags = parser.parse_args()
    found = [found_in(folder, flags.text, flags.ids) for folder in flags.runs]
    names = {run["name"] for run in found}
    kept = [run for run in recorded() if run["name"] not in names]
    write_durably(RECORDED, json.dumps({"runs": kept + found}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
