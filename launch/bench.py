"""Time one op: `python launch/bench.py --op reservoir [--only TEXT] [--out FILE]`, on a GPU.

Every case is checked against its reference first, and not timed when it is off.  Times are medians, between CUDA
events, of 5 runs at a time; the floor is what no version could beat.
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


@command
def main() -> None:
    ops = sorted(path.stem for path in (ROOT / "benchmarks/ops").glob("*.py") if path.stem != "case")
    parser = argparse.ArgumentParser(description="Check and time one op on a GPU.")
    parser.add_argument("--op", required=True, help=", ".join(ops))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--out", type=path_flag, metavar="FILE", help="write the results as JSON")
    flags = parser.parse_args()
    if flags.op not in ops:
        raise UserError(f"--op {flags.op} is not one of {', '.join(ops)}")
    if flags.out is not None:
        ready_folder(flags.out.parent)
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
