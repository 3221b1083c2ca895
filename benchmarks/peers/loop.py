"""What peers that train have in common: the run whose shape and rows they take, timed steps, and their record."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from benchmarks.model.measure import check_data
from lfm.config import path_flag
from lfm.errors import UserError
from lfm.files import ready_folder, write_durably
from lfm.training.metrics import peak_flops
from lfm.training.run import RunConfig, environment


def parse(description: str) -> tuple[RunConfig, argparse.Namespace]:
    """The flags of every peer.  Raises UserError where the data are missing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default="configs/lfm_3b_h200.yaml", help="whose model's shape and rows it takes")
    parser.add_argument("--random-ids", action="store_true", help="in place of the data that the config names")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=path_flag, metavar="FILE", help="write the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    flags = parser.parse_intermixed_args()
    if flags.warmup < 1 or flags.steps < 1:
        raise UserError(f"--warmup {flags.warmup} and --steps {flags.steps} are to be 1 at least")
    if flags.out is not None:
        ready_folder(flags.out.parent)
    run = RunConfig.load(flags.config, flags.overrides)
    if not flags.random_ids:
        check_data(run)
    return run, flags


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_steps(step: Callable[[], float], flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of the steps after the warm-up, and the losses of all; `step` gives its own."""
    seconds, losses = [], []
    for _ in range(flags.warmup + flags.steps):
        start = synchronized(device)
        losses.append(step())
        seconds.append(synchronized(device) - start)
    return {
        "seconds": seconds[flags.warmup :],
        "losses": losses,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def record(
    name: str,
    run: RunConfig,
    timed: dict[str, Any],
    flags: argparse.Namespace,
    *,
    flops_per_token: float,
    world: int,
    **more: Any,
) -> None:
    """Print a line, and write the result where it was asked for."""
    tokens, seconds = run.training.global_batch_size * run.model.seq_length, timed.pop("seconds")
    rate = tokens / statistics.median(seconds) / world
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = peak_flops(gpu)
    found = {
        "name": name,
        "gpus": world,
        "tokens_per_step": tokens,
        "micro_batch_size": run.training.micro_batch_size,
        "tokens_per_second_per_gpu": rate,
        "range": [tokens / each / world for each in (max(seconds), min(seconds))],
        "mfu": rate * flops_per_token / peak if peak else None,
        "steps_measured": len(seconds),
        **timed,
        **more,
    }
    mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
    slow, fast = found["range"]
    print(f"{name}: {rate:,.0f} tokens/s a GPU ({slow:,.0f} to {fast:,.0f}){mfu}", flush=True)
    print("losses", [round(loss, 4) for loss in found["losses"]], flush=True)
    if gpu is None:
        print("a dry run without a GPU: speeds mean nothing", flush=True)
    if flags.out is not None:
        about = {"date": date.today().isoformat(), "environment": environment(), "runs": 1}
        content = about | {"random_ids": flags.random_ids, "config": run.model_dump(mode="json"), "peers": [found]}
        write_durably(flags.out, json.dumps(content, indent=1).encode() + b"\n")
