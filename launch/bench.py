"""Time an op or a model: `python launch/bench.py --op reservoir [--only TEXT]`, `... --model CONFIG [key.path=value]`.

An op, on a GPU: every case is checked against its reference first, and not timed when it is off.  Times are medians,
between CUDA events, of 5 runs at a time; the floor is what no version could beat.

A model, under its config's layout on --gpus N or the processes of a launcher: tokens/s, MFU, and a waterfall, the parts
of a step that sum to it, with real routing and with forced balance.  A layout is certified first on a small model.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import ready_folder, write_durably

ROOT = Path(__file__).resolve().parents[1]
RUNS_AT_A_TIME = 5


@dataclass
class Result:
    name: str
    errors: dict[str, float]
    limits: dict[str, float]
    floor_seconds: float
    floor_kind: str
    flops: float
    bytes: float
    seconds: float | None = None
    """None: an error is beyond its limit."""
    peers: dict[str, float | None] | None = None
    """None: it does not run here."""


def median_seconds(run: Callable[[], object], *, repeats: int = 15) -> float:
    import torch

    run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(RUNS_AT_A_TIME):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / RUNS_AT_A_TIME)
    return statistics.median(times)


def peer_seconds(name: str, run: Callable[[], object]) -> float | None:
    """A library that does not run here must not end the benchmark."""
    try:
        return median_seconds(run)
    except Exception as error:
        print(f"{name} does not run: {type(error).__name__}", flush=True)
        return None


def arguments(ops: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time one op on a GPU, or a model under its layout.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--op", help=", ".join(ops))
    what.add_argument("--model", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--out", type=path_flag, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="of an op: cases whose name holds this")
    parser.add_argument("--gpus", type=int, metavar="N", help="of a model: start N processes; default one")
    parser.add_argument("--routing", choices=("real", "balanced", "both"), default="both", help="of a model's experts")
    parser.add_argument("--random-ids", action="store_true", help="in place of the data that the config names")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are timed, by routing")
    parser.add_argument(
        "--profiled-steps", type=int, default=2, metavar="N", help="steps after those, for the waterfall"
    )
    parser.add_argument("--plot", type=path_flag, metavar="FILE", help="draw the waterfall")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="of the model's config, applied in order"
    )
    return parser.parse_intermixed_args()


@command
def main() -> None:
    ops = sorted(path.stem for path in (ROOT / "benchmarks/ops").glob("*.py") if path.stem != "case")
    flags = arguments(ops)
    for path in (flags.out, flags.plot):
        if path is not None:
            ready_folder(path.parent)
    if flags.op is not None and flags.overrides:
        raise UserError(f"{flags.overrides[0]} goes with --model; an op has no config")
    if flags.op is not None and flags.gpus is not None:
        raise UserError(f"--gpus {flags.gpus} goes with --model; an op runs on one")
    if flags.model is not None and flags.only:
        raise UserError(f"--only {flags.only} goes with --op; a model has no cases, see --routing")
    if flags.model is not None:
        for name, least in (("warmup", 1), ("steps", 1), ("profiled_steps", 1)):
            if getattr(flags, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)} is less than {least}")
        from benchmarks.model.command import bench_model

        bench_model(flags)
    else:
        bench_op(flags, ops)


def bench_op(flags: argparse.Namespace, ops: list[str]) -> None:
    if flags.op not in ops:
        raise UserError(f"--op {flags.op} is not one of {', '.join(ops)}")
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU to time on; run this where torch.cuda.is_available()")
    from benchmarks.ops.case import rate

    torch.manual_seed(0)
    results = []
    for case in importlib.import_module(f"benchmarks.ops.{flags.op}").cases():
        if flags.only not in case.name:
            continue
        about = (case.limits, case.floor_seconds, case.floor_kind, case.flops, case.bytes)
        result = Result(case.name, case.check(), *about)
        results.append(result)
        off = [name for name, limit in case.limits.items() if not result.errors[name] <= limit]
        if off:
            shown = ", ".join(f"{name} {result.errors[name]:.1e} > {case.limits[name]:.0e}" for name in off)
            print(f"{case.name}: NOT TIMED, {shown}", flush=True)
            continue
        result.seconds = median_seconds(case.run)
        result.peers = {name: peer_seconds(name, peer) for name, peer in case.peers.items()}
        best = min(((seconds, name) for name, seconds in result.peers.items() if seconds is not None), default=None)
        beside = "" if best is None else f"; {best[1]} {best[0] * 1e3:.3f} ms"
        reached = rate(case.floor_kind, case.flops, case.bytes, result.seconds)
        print(
            f"{case.name}: {result.seconds * 1e3:.3f} ms, {reached}, "
            f"{result.seconds / case.floor_seconds:.1f} x the floor ({case.floor_kind}) of "
            f"{case.floor_seconds * 1e3:.3f} ms{beside}",
            flush=True,
        )
    if flags.out is not None:
        from lfm.training.run import environment

        about = {"op": flags.op, "date": date.today().isoformat(), "environment": environment()}
        content = about | {"cases": [asdict(result) for result in results]}
        write_durably(flags.out, json.dumps(content, indent=1).encode() + b"\n")
    if any(result.seconds is None for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
