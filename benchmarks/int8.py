"""`--int8` beside float32 on a CPU: the table of docs/export.md.

    python benchmarks/int8.py --runs runs/A,runs/B --configs liquidnet_base,transformer_small --out FILE

Of runs, trained ones: perplexity of the validation split of their data.  Of configs, with random weights, on which time
does not depend: tokens/s reading rows of 256 and continuing one of them, the two ways in turns; medians.  Of products,
given as outputs x inputs: microseconds for one token and for 64, beside torch's own product of 8-bit weights with
activations that stay as they are.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from lfm.checkpoint.manifest import read_manifest
from lfm.data.stream import DataConfig, open_split
from lfm.evaluation.held_out import evaluate, score
from lfm.inference.int8 import Int8Linear, use_int8
from lfm.inference.load import open_model
from lfm.inference.sampling import prefill
from lfm.models.initialization import initialize, materialize
from lfm.models.language_model import LanguageModel
from lfm.models.registry import build
from lfm.training.run import RunConfig, environment

ROW = 256


def perplexities(run: str, data: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"run": Path(run).name}
    for name, int8 in (("float32", False), ("int8", True)):
        model, _, checkpoint = open_model(run, device="cpu", int8=int8)
        c = model.config
        path = data or read_manifest(checkpoint, warn=False)["config"]["data"]["path"]
        of_data = DataConfig(path=path, allow_smaller_tokenizer=True)
        rows = open_split(of_data, "validation", seq_length=c.seq_length, vocab_size=c.vocab_size)
        loss = evaluate(functools.partial(score, model), rows).loss
        found |= {"step": read_manifest(checkpoint, warn=False)["step"], f"perplexity_{name}": math.exp(loss)}
    return found


def model_of(config: Any, *, int8: bool) -> LanguageModel:
    model = materialize(lambda: build(config), device=torch.device("cpu"), dtype=torch.float32)
    initialize(model, seed=0)
    if int8:
        use_int8(model)
    return model.eval()


@torch.no_grad()
def speeds(name: str, tokens: int) -> dict[str, Any]:
    config = RunConfig.load(f"configs/{name}.yaml").model
    models = {"float32": model_of(config, int8=False), "int8": model_of(config, int8=True)}
    ids = torch.randint(0, config.vocab_size, (ROW,), generator=torch.Generator().manual_seed(0)).tolist()
    reading: dict[str, list[float]] = {of: [] for of in models}
    writing: dict[str, list[float]] = {of: [] for of in models}
    running = {of: prefill(model, ids) for of, model in models.items()}
    for of, model in 5 * list(models.items()):
        start = time.perf_counter()
        prefill(model, ids)
        reading[of].append(time.perf_counter() - start)
    for of, model in tokens * list(models.items()):
        start = time.perf_counter()
        hidden, state = running[of]
        running[of] = prefill(model, [int(model.logits(hidden)[0].argmax())], state)
        writing[of].append(time.perf_counter() - start)
    linears = [module for module in models["int8"].modules() if isinstance(module, Int8Linear)]
    parameters = sum(parameter.numel() for parameter in models["float32"].parameters())
    return {
        "config": name,
        "parameters": parameters,
        "share_int8": sum(linear.weight.numel() for linear in linears) / parameters,
        **{f"read_tokens_per_second_{of}": ROW / statistics.median(times) for of, times in reading.items()},
        **{f"write_tokens_per_second_{of}": 1 / statistics.median(times) for of, times in writing.items()},
    }


@torch.no_grad()
def product(outputs: int, inputs: int, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(tokens, inputs, generator=generator)
    int8, half = Int8Linear(linear), x.bfloat16()
    weight_only = torch.ops.aten._weight_int8pack_mm
    ways: dict[str, Callable[[], Any]] = {
        "float32": lambda: linear(x),
        "int8": lambda: int8(x),
        "weights_float32": lambda: weight_only(x, int8.weight, int8.scale),
        "weights_bfloat16": lambda: weight_only(half, int8.weight, int8.scale.bfloat16()),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, compute in 12 * list(ways.items()):
        start = time.perf_counter()
        compute()
        times[way].append(time.perf_counter() - start)
    found = {f"microseconds_{way}": 1e6 * statistics.median(of[2:]) for way, of in times.items()}
    return {"product": [outputs, inputs], "tokens": tokens, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", default="")
    parser.add_argument("--data", help="data set folder; default: each run's own")
    parser.add_argument("--configs", default="liquidnet_small,liquidnet_base,transformer_small")
    parser.add_argument("--products", default="", metavar="OUTPUTSxINPUTS,...")
    parser.add_argument("--tokens", type=int, default=50, help="written by each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8.json"))
    flags = parser.parse_args()
    rows = [perplexities(run, flags.data) for run in flags.runs.split(",") if run]
    rows += [speeds(name, flags.tokens) for name in flags.configs.split(",") if name]
    for size in filter(None, flags.products.split(",")):
        outputs, inputs = map(int, size.split("x"))
        rows += [product(outputs, inputs, tokens) for tokens in (1, 64)]
    for row in rows:
        print(json.dumps(row), flush=True)
    result = {"date": date.today().isoformat(), "environment": environment(), "threads": torch.get_num_threads()}
    flags.out.write_text(json.dumps(result | {"runs": 1, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
