"""Four LFMs of one shape rule, each at four learning rates: `python benchmarks/ladder.py --data DIR [--sizes 384,640]`.

Shows whether the best rate of a small model is that of a large one, and whether losses of the small ones foretell that
of the large one.  Each run is `configs/lfm_350m.yaml` at another width: heads of 64, half as many key/value heads,
experts of 7/8 of the width, 4 layers and one more for each 128 of width.  Runs are appended to the file of --out as
they end; --report makes the table of all that are there, and docs/ladder.png.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import numpy as np

from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig, environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/ladder.jsonl"
SIZES = (384, 640, 896, 1152)
RATES = (6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
TOKENS, ROWS, LENGTH = 10_000_000, 32, 2048


def run_of(hidden_size: int, rate: float, data: str, output: str, overrides: list[str]) -> RunConfig:
    heads = hidden_size // 64
    return RunConfig.load(
        ROOT / "configs/lfm_350m.yaml",
        [
            *(f"data.path={data}", f"output={output}", f"name=ladder_{hidden_size}_{rate:g}"),
            *(f"model.hidden_size={hidden_size}", f"model.num_layers={4 + hidden_size // 128}"),
            *(f"model.attention.num_attention_heads={heads}", f"model.attention.num_query_groups={heads // 2}"),
            *(f"model.ffn.moe_ffn_hidden_size={hidden_size * 7 // 8}", f"model.seq_length={LENGTH}"),
            *(f"training.global_batch_size={ROWS}", "training.micro_batch_size=8"),
            *(f"training.steps={math.ceil(TOKENS / ROWS / LENGTH)}", f"optimizer.lr={rate:g}"),
            *("schedule.warmup_steps=20", "validation.every_steps=50", "validation.max_rows=128"),
            *("logging.every_steps=1", "logging.tensorboard=false", "samples.prompts=[]"),
            *("checkpoint.every_steps=0", "checkpoint.save_at_end=false", *overrides),
        ],
    )


def summarise(run: RunConfig, rate: float) -> dict:
    records = read_metrics(run.folder / "metrics.jsonl")
    steps = [r for r in records if "cross_entropy" in r]
    counts = run.model.count_parameters()
    return {
        "hidden_size": run.model.hidden_size,
        "num_layers": run.model.num_layers,
        "rate": rate,
        "active_non_embedding": counts.active_non_embedding,
        "active": counts.active,
        "total": counts.total,
        "tokens": steps[-1]["tokens"],
        "validation": [[r["step"], r["validation_loss"]] for r in records if "validation_loss" in r],
        "largest_norm_after_step_3": max([r["grad_norm"] for r in steps[3:]], default=None),
        "load_max_over_mean_after_step_50": max([r["expert_load_max_over_mean"] for r in steps[50:]], default=None),
        "tokens_per_second": float(np.median([r["tokens_per_second"] for r in steps[10:] or steps])),
        "environment": environment(),
    }


def recorded(path: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def best_rate(runs: list[dict]) -> tuple[float, float]:
    """Rate and loss of the parabola, in the logarithm of the rate, through the best run and its neighbours."""
    runs = sorted(runs, key=lambda run: run["rate"])
    losses = [run["validation"][-1][1] for run in runs]
    best = min(range(len(runs)), key=losses.__getitem__)
    middle = min(max(best, 1), len(runs) - 2)
    x = [math.log(run["rate"]) for run in runs[middle - 1 : middle + 2]]
    a, b, c = np.polyfit(x, losses[middle - 1 : middle + 2], 2)
    if a <= 0 or best != middle:  # no minimum within the rates that ran
        return runs[best]["rate"], losses[best]
    return math.exp(-b / (2 * a)), float(c - b * b / (4 * a))


def report(runs: list[dict], plot: Path | None) -> str:
    sizes = sorted({run["hidden_size"] for run in runs})
    by_size = {size: [run for run in runs if run["hidden_size"] == size] for size in sizes}
    rates = sorted({run["rate"] for run in runs})
    lines = [
        f"| width, layers | active, of it non-embedding | {' | '.join(f'lr {rate:g}' for rate in rates)} | best lr |",
        "| --- " * (len(rates) + 3) + "|",
    ]
    best = {size: best_rate(by_size[size]) for size in sizes}
    for size in sizes:
        some = by_size[size][0]
        losses = {run["rate"]: run["validation"][-1][1] for run in by_size[size]}
        shown = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        counts = f"{some['active'] / 1e6:.0f} M, {some['active_non_embedding'] / 1e6:.1f} M"
        lines.append(f"| {size}, {some['num_layers']} | {counts} | {' | '.join(shown)} | {best[size][0]:.2g} |")
    *small, large = sizes
    count = {size: by_size[size][0]["active_non_embedding"] for size in sizes}
    slope, start = np.polyfit([math.log(count[s]) for s in small], [math.log(best[s][1]) for s in small], 1)
    predicted = math.exp(start + slope * math.log(count[large]))
    measured = best[large][1]
    ratio = max(rate for rate, _ in best.values()) / min(rate for rate, _ in best.values())
    lines += [
        "",
        f"Best rates of all widths are within a factor of {ratio:.2f}. The power law through the best losses of the "
        f"{len(small)} smaller models, {math.exp(start):.2f} x N^{slope:.4f}, gives {predicted:.3f} for the largest; "
        f"measured {measured:.3f} ({measured - predicted:+.3f}).",
    ]
    if plot is not None:
        _plot(by_size, best, count, (math.exp(start), slope), plot)
    return "\n".join(lines)


def _plot(by_size: dict, best: dict, count: dict, law: tuple[float, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for size, runs in by_size.items():
        runs = sorted(runs, key=lambda run: run["rate"])
        line = left.plot([r["rate"] for r in runs], [r["validation"][-1][1] for r in runs], "o-", label=f"width {size}")
        left.plot(*best[size], "*", color=line[0].get_color(), markersize=12)
    left.set(xscale="log", xlabel="learning rate at width 1024", ylabel="validation loss after 10 M tokens (nats)")
    left.legend()
    sizes = sorted(count)
    right.plot([count[s] for s in sizes], [best[s][1] for s in sizes], "o", label="best rate of each width")
    grid = np.geomspace(count[sizes[0]], count[sizes[-1]], 50)
    right.plot(grid, law[0] * grid ** law[1], "--", label="power law of the smaller ones")
    right.set(xscale="log", xlabel="active parameters without embeddings", ylabel="validation loss (nats)")
    right.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/python_2048_32k", help="rows of 2048 ids of a vocabulary of 32,000")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--report", action="store_true", help="table and plot of what --out holds")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/ladder.png")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    flags = parser.parse_args()
    if flags.report:
        print(report(recorded(flags.out), flags.plot))
        return
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, flags.sizes.split(",")):
            for rate in map(float, flags.rates.split(",")):
                run = run_of(size, rate, flags.data, folder, flags.overrides)
                train(run)
                with flags.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(summarise(run, rate)) + "\n")


if __name__ == "__main__":
    main()
