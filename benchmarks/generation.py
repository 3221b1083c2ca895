"""Time and memory of one generated token after prefixes of 1k to 64k tokens: `python benchmarks/generation.py`.

Random weights: neither depends on them.  Families with a state of fixed size should be flat; attention grows.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from lfm.inference.sampling import prefill
from lfm.models.initialization import initialize, materialize
from lfm.models.registry import build
from lfm.training.run import RunConfig, environment

PREFIXES = (1024, 4096, 16_384, 65_536)
LONGEST_ATTENDED = 16_384
"""Of these, for models that attend: reading more takes long, and the trend shows."""


@torch.no_grad()
def measure(config: str, device_type: str, tokens: int) -> list[dict[str, Any]]:
    """Read a text to each prefix, keep the states, then generate from all of them in turns: what else the machine does
    meets every prefix alike.
    """
    device = torch.device(device_type)
    model_config = RunConfig.load(f"configs/{config}.yaml").model
    prefixes = PREFIXES
    if model_config.context_limit is not None:
        prefixes = tuple(prefix for prefix in PREFIXES if prefix <= LONGEST_ATTENDED)
        model_config = model_config.model_copy(update={"seq_length": prefixes[-1] + tokens})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = materialize(lambda: build(model_config), device=device, dtype=dtype)
    initialize(model, seed=0)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows, running, state, read = [], [], None, 0
    for prefix in prefixes:
        ids = torch.randint(0, model_config.vocab_size, (prefix - read,), generator=generator).tolist()
        hidden, state = prefill(model, ids, state)
        read = prefix
        running.append((hidden, state))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            {
                "config": config,
                "kind": model_config.kind,
                "prefix": prefix,
                "state_bytes": state.num_bytes,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak,
            }
        )
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(tokens):
        for i, (hidden, state) in enumerate(running):
            start = time.perf_counter()
            token = int(model.logits(hidden)[0].argmax())
            running[i] = prefill(model, [token], state)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[i].append(time.perf_counter() - start)
    for row, times in zip(rows, seconds, strict=True):
        row["milliseconds_per_token"] = 1e3 * statistics.median(times)
        print(json.dumps(row), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, sizes) = plt.subplots(1, 2, figsize=(10, 4))
    for config in dict.fromkeys(row["config"] for row in rows):
        own = [row for row in rows if row["config"] == config]
        prefixes = [row["prefix"] for row in own]
        times.plot(prefixes, [row["milliseconds_per_token"] for row in own], "o-", label=config)
        sizes.plot(prefixes, [row["state_bytes"] / 1024 for row in own], "o-", label=config)
    for axes, label in ((times, "ms per generated token"), (sizes, "KiB of state")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of prefix")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="lower center", ncol=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--configs",
        default="laerc_shakespeare,liquidlm,liquidnn_base,liquidnet_small,lstm_debug,transformer_small",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=50, help="generated after each prefix; their median counts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/streaming.png"))
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for config in flags.configs.split(","):
        # A process for each, so that its peak memory is its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows += process.submit(measure, config, flags.device, flags.tokens).result()
    result = {"date": date.today().isoformat(), "environment": environment(), "runs": 1, "rows": rows}
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, flags.plot)


if __name__ == "__main__":
    main()
