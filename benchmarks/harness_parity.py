"""Tasks on an exported model through the harness's own class and on ours: `python benchmarks/harness_parity.py`.

    python -m data_pipeline.make_tasks
    python benchmarks/harness_parity.py --checkpoint runs/lfm_debug --checkpoint runs/liquidnet_debug

Each checkpoint is exported by `lfm export --format hf`, opened with transformers and scored by `HFLM`; every metric of
every task must be the same to 1e-4 at each batch size.  Float32 on the CPU; the extras `hf` and `lm-eval`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from lfm.evaluation.harness import Tasks, open_tasks
from lfm.inference.load import open_model

TOLERANCE = 1e-4
"""Of a metric; of a perplexity relative, as its logarithm is the mean that was computed."""
SHIPPED = ("stdlib_lines", "stdlib_last_word", "gcide_words")


def theirs(folder: Path, tasks: Tasks, *, batch_size: int, limit: int | None) -> dict[str, dict[str, float]]:
    """Task -> metric -> value of the exported model."""
    adapter = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=batch_size)
    found: Any = evaluate(lm=adapter, task_dict=tasks.loaded, limit=limit, bootstrap_iters=0)
    return {
        name: {key.removesuffix(",none"): value for key, value in of.items() if "," in key and "_stderr" not in key}
        for name, of in found["results"].items()
    }


def export(checkpoint: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "lfm", "export", "--checkpoint", checkpoint, "--format", "hf", "--out", folder]
    subprocess.run([str(word) for word in command], check=True, cwd=Path(__file__).parents[1])


def compare(checkpoint: Path, exported: Path, tasks: Tasks, batch_sizes: list[int], limit: int | None) -> list[dict]:
    """A row for each batch size, task and metric."""
    model, tokenizer, _ = open_model(checkpoint, device="cpu")
    rows = []
    for batch_size in batch_sizes:
        own = tasks.evaluate(model, tokenizer, batch_size=batch_size, limit=limit)
        for task, metrics in theirs(exported, tasks, batch_size=batch_size, limit=limit).items():
            for metric, value in metrics.items():
                ours = own[task].metrics[metric]
                row = {"family": model.config.kind, "batch_size": batch_size, "task": task, "metric": metric}
                error = abs(ours - value) / (max(1.0, abs(value)) if metric.endswith("perplexity") else 1.0)
                rows.append({**row, "ours": ours, "exported": value, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, type=Path, metavar="RUN_OR_STEP")
    parser.add_argument(
        "--exported", action="append", type=Path, metavar="DIR", help="export made before, one for each"
    )
    parser.add_argument("--tasks", default=",".join(SHIPPED), metavar="NAME,...")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    flags = parser.parse_args()
    tasks = open_tasks(flags.tasks.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, checkpoint in enumerate(flags.checkpoint):
            folder = flags.exported[number] if flags.exported else Path(scratch) / str(number)
            if not flags.exported:
                export(checkpoint.absolute(), folder)
            rows += compare(checkpoint, folder, tasks, flags.batch_sizes, flags.limit)
    for row in rows:
        print(
            f"{row['family']:12} batch {row['batch_size']:2}  {row['task']:18} {row['metric']:10} "
            f"ours {row['ours']:.6g}  exported {row['exported']:.6g}  difference {row['error']:.1e}"
        )
    if flags.out is not None:
        flags.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    worst = max(row["error"] for row in rows)
    print(f"{len(rows)} numbers, largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
