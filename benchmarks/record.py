"""Turn a run folder into a recorded result: `python benchmarks/record.py runs/NAME [--out FILE] [--skip-steps 20]`.

Tokens/s, MFU and memory are the median of the logged windows after `--skip-steps`, validation and saving left out.
"""

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.training.metrics import peak_flops
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig


def summarise(folder: Path, *, skip_steps: int) -> dict:
    run = RunConfig.load(folder / "config.yaml")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    records = read_metrics(folder / "metrics.jsonl")
    train = [r for r in records if "cross_entropy" in r]
    windows = [r for r in train if r["step"] > skip_steps and "tokens_per_second" in r]
    rates = [r["tokens_per_second"] for r in windows]
    rate = statistics.median(rates)
    peak = peak_flops(environment["gpu"])
    compression = folder / "bits_per_byte.json"
    return {
        **({"bits_per_byte": json.loads(compression.read_text(encoding="utf-8"))} if compression.exists() else {}),
        "run": run.name,
        "date": date.today().isoformat(),
        "environment": environment,
        "seed": run.seed,
        "runs": 1,
        "steps": train[-1]["step"],
        "tokens_per_step": run.training.global_batch_size * run.model.seq_length,
        "parameters": run.model.count_parameters().total,
        "tokens_per_second": rate,
        "tokens_per_second_range": [min(rates), max(rates)],
        "mfu_attended": statistics.median(r["mfu"] for r in windows) if peak else None,
        "mfu_if_rows_were_one_document": rate * run.model.flops_per_token() / peak if peak else None,
        "peak_memory_gib": max(r["memory_gib"] for r in windows),
        "first_logged_loss": train[0]["cross_entropy"],
        "last_loss": train[-1]["cross_entropy"],
        "validation": [[r["step"], r["validation_loss"]] for r in records if "validation_loss" in r],
        "loss": [[r["step"], r["cross_entropy"]] for r in train],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--skip-steps", type=int, default=20)
    flags = parser.parse_args()
    result = summarise(flags.folder, skip_steps=flags.skip_steps)
    out = flags.out or Path("benchmarks/results") / f"{result['run']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {result['tokens_per_second']:,.0f} tokens/s, last loss {result['last_loss']:.3f}")


if __name__ == "__main__":
    main()
