"""Presets of the smaller families on one device: `python benchmarks/families.py --data FOLDER --out FILE`.

Each preset trains with the batch it was published with, through launch/pretrain.py, on a folder of GPT-2 ids
(`train.bin`); speed is the median of the logged windows after the first tenth.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig, environment

LAERC_LIBRARY = [
    *("model.hidden_size=512", "model.num_layers=16", "model.seq_length=1024"),
    *("training.global_batch_size=8", "training.micro_batch_size=8"),
]
PRESETS: dict[str, tuple[str, int, list[str]]] = {
    "laerc_shakespeare": ("laerc_shakespeare", 1000, []),
    "laerc_owt": ("laerc_owt", 1000, []),
    "laerc_library": ("laerc_owt", 1000, LAERC_LIBRARY),
    "laerc_library_chunked": ("laerc_owt", 1000, [*LAERC_LIBRARY, "model.backend=chunked", "model.warmup=32"]),
    # The published micro-batch; an update of the published recipe is 16 of them.
    "liquidlm": ("liquidlm", 1000, ["training.global_batch_size=32", "data.allow_smaller_tokenizer=true"]),
    "liquidnn_small": ("liquidnn_small", 200, []),
    "liquidnn_base": ("liquidnn_base", 200, []),
    **{
        f"liquidnn_base_{rows}": (
            "liquidnn_base",
            200,
            [f"training.global_batch_size={rows}", f"training.micro_batch_size={rows}"],
        )
        for rows in (64, 128, 512)
    },
    "liquidnn_large": ("liquidnn_large", 200, []),
    "liquidnet_tiny": ("liquidnet_tiny", 1000, []),
    "liquidnet_small": ("liquidnet_small", 1000, []),
    "liquidnet_base": ("liquidnet_base", 1000, []),
    "transformer_small": ("transformer_small", 1000, []),
}
"""Name -> (config, steps, overrides); liquidnn's steps hold both of its phases."""

ORIGINAL = {
    "laerc_owt": 398_941,
    "laerc_library": 11_366,
    "laerc_library_chunked": 11_366,
    "liquidlm": 86_316,
    "liquidnn_base": {"off": 675, "on": 513},
}
"""Tokens/s of the original code on an H200; liquidnn_base at batch 8 with plasticity off and on."""


def measure(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    config, steps, overrides = PRESETS[name]
    steps = flags.steps or steps
    run_name = f"bench_{name}"
    common = [
        *(f"name={run_name}", f"output={flags.output}", f"data.path={flags.data}", f"training.steps={steps}"),
        *("validation.every_steps=0", "validation.max_rows=64", "samples.prompts=[]", "checkpoint.every_steps=0"),
        *(f"logging.every_steps={max(1, steps // 20)}", "logging.tensorboard=false", "checkpoint.save_at_end=false"),
        *("checkpoint.resume=never", *overrides, *flags.overrides),
    ]
    began = time.monotonic()
    command = [sys.executable, "launch/pretrain.py", "--config", f"configs/{config}.yaml", *common]
    done = subprocess.run(
        command,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=flags.timeout,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    run = RunConfig.load(f"configs/{config}.yaml", common)
    records = [r for r in read_metrics(run.folder / "metrics.jsonl") if "tokens_per_second" in r]
    steady = [r for r in records if r["step"] > steps // 10]

    def rate(chosen: list[dict[str, Any]]) -> float:
        return statistics.median(r["tokens_per_second"] for r in chosen)

    found = {
        "name": name,
        "steps": steps,
        "tokens_per_step": run.training.global_batch_size * run.model.seq_length,
        "dtype": run.training.dtype,
        "parameters": run.model.count_parameters().total,
        "tokens_per_second": rate(steady),
        "range": [min(r["tokens_per_second"] for r in steady), max(r["tokens_per_second"] for r in steady)],
        "memory_gib": max(r["memory_gib"] for r in records),
        "first_loss": records[0]["mean_cross_entropy"],
        "last_loss": records[-1]["mean_cross_entropy"],
        "seconds": time.monotonic() - began,
        "original_tokens_per_second": ORIGINAL.get(name),
    }
    if run.model.kind == "liquidnn":
        turn = int(steps * run.model.plastic_from)
        window = run.logging.every_steps
        # Without the first window, which warms up, and the one in which plasticity begins.
        phases = {"off": (window, turn), "on": (turn + window, steps)}
        for phase, (after, last) in phases.items():
            chosen = [r for r in records if after < r["step"] <= last]
            found[f"plasticity_{phase}"] = rate(chosen) if chosen else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train.bin, val.bin and GPT-2's tokenizer.json")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--steps", type=int, help="in place of each preset's own number")
    parser.add_argument("--output", default="runs", help="where the run folders go")
    parser.add_argument("--timeout", type=float, default=400, help="seconds that one preset may take")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for all of them")
    flags = parser.parse_intermixed_args()
    result: dict[str, Any] = (
        json.loads(flags.out.read_text(encoding="utf-8")) if flags.out.exists() else {"presets": []}
    )
    for name in flags.presets.split(","):
        try:
            found = measure(name, flags)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{name} failed: {error}", flush=True)
            continue
        print(json.dumps(found), flush=True)
        found |= {"commit": environment()["commit"], "date": date.today().isoformat()}
        result["presets"] = [row for row in result["presets"] if row["name"] != name] + [found]
        result |= {"date": date.today().isoformat(), "environment": environment(), "runs": 1}
        flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
