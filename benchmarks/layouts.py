"""LFM-3B under parallel layouts, side by side: `python benchmarks/layouts.py --layouts dp2_z1,ep2,tp2,pp2 --out FILE`.

For each layout, in processes of this machine with one GPU each: first the certificate on a small config over NCCL (a
layout whose numbers are wrong gets no speed), then steps of the full model on real packed rows with real routing, one
of them profiled.  `one` is the local engine on one GPU with as many rows: what scaling is measured against.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from lfm.data.stream import BatchStream, open_split
from lfm.parallel.layout import Layout, check_layout
from lfm.parallel.process import Process, prepare_environment
from lfm.training.metrics import PEAK_FLOPS
from lfm.training.run import RunConfig, environment


def measure(process: Process, run: RunConfig, layout: Layout | None, warmup: int, steps: int) -> dict[str, Any]:
    """One process's figures: seconds a step, losses, peak memory, and how the profiled step was spent."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    if layout is None:
        from lfm.training.engine import LocalEngine

        engine: Any = LocalEngine(
            run.model,
            run.optimizer,
            seed=run.seed,
            device=device,
            dtype=torch.bfloat16,
            micro_batch_size=run.training.micro_batch_size,
            recompute=run.training.recompute,
        )
    else:
        from lfm.parallel import groups
        from lfm.training.parallel_engine import ParallelEngine

        groups.join(process, device, timeout_seconds=300)
        engine = ParallelEngine(
            run.model,
            run.optimizer,
            groups.make_groups(layout, device),
            seed=run.seed,
            dtype=torch.bfloat16,
            micro_batch_size=run.training.micro_batch_size,
            recompute=run.training.recompute,
        )
    model, rows_per_step = run.model, run.training.global_batch_size
    rows = open_split(run.data, "train", seq_length=model.seq_length, vocab_size=model.vocab_size)
    stream = BatchStream(
        rows,
        seed=run.seed,
        rows_per_step=rows_per_step,
        take=engine.rows_of_step(rows_per_step),
        prefetch_threads=2,
    )
    seconds, losses, pairs, schedule = [], [], 0, []

    def one_step() -> None:
        nonlocal pairs
        ids, lengths = stream.next()
        start = engine.synchronize()
        result = engine.forward_backward(ids, lengths)
        middle = engine.synchronize()
        engine.step(1e-5)
        seconds.append(engine.synchronize() - start)
        schedule.append(middle - start)
        losses.append(result.cross_entropy)
        pairs = result.attended_pairs

    for _ in range(warmup + steps):
        one_step()
    profiled = _profile(one_step)
    stream.close()
    if layout is not None:
        torch.distributed.barrier()
        groups.leave()
    return {
        "seconds": seconds[warmup : warmup + steps],
        "schedule_seconds": schedule[warmup : warmup + steps],
        "losses": losses,
        "attended_pairs": pairs,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "profile": profiled,
    }


def _profile(one_step: Any) -> dict[str, float]:
    """Shares of one step's wall time on this GPU: kernels that compute, communication alone, neither."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        one_step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    spans: dict[str, list[tuple[float, float]]] = {"compute": [], "collective": [], "send_receive": []}
    for event in profiler.events() or []:
        if event.device_type != DeviceType.CUDA or event.time_range.elapsed_us() <= 0:
            continue
        kind = "compute"
        if "nccl" in event.name.lower():
            kind = "send_receive" if "sendrecv" in event.name.lower() else "collective"
        spans[kind].append((event.time_range.start, event.time_range.end))
    everything = [span for kind in spans.values() for span in kind]
    first, last = min(s for s, _ in everything), max(e for _, e in everything)
    wall_us = last - first
    busy = _covered(spans["compute"])
    return {
        "wall_seconds": wall,
        "compute": busy / wall_us,
        # Communication that no computation hides.
        "collective": (_covered(spans["compute"] + spans["collective"]) - busy) / wall_us,
        "send_receive": (_covered(everything) - _covered(spans["compute"] + spans["collective"])) / wall_us,
        "idle": 1 - _covered(everything) / wall_us,
        "kernels": len(everything),
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -1.0
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def summary(run: RunConfig, name: str, layout: Layout | None, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    world = len(ranks)
    tokens = run.training.global_batch_size * run.model.seq_length
    seconds = statistics.median(ranks[0]["seconds"])
    rate = tokens / seconds / world
    attended = ranks[0]["attended_pairs"] / tokens
    stages = layout.pipeline * layout.virtual_pipeline if layout else 1
    micro_batches = layout.num_micro_batches if layout else 0
    return {
        "name": name,
        "layout": layout.name if layout else "one GPU, local engine",
        "describe": layout.describe() if layout else "",
        "gpus": world,
        "tokens_per_step": tokens,
        "tokens_per_second_per_gpu": rate,
        "range": [tokens / s / world for s in (max(ranks[0]["seconds"]), min(ranks[0]["seconds"]))],
        "mfu_attended": rate * run.model.flops_per_token(attended=attended) / PEAK_FLOPS["H200"],
        "mfu_if_rows_were_one_document": rate * run.model.flops_per_token() / PEAK_FLOPS["H200"],
        "schedule_share": statistics.median(ranks[0]["schedule_seconds"]) / seconds,
        "peak_memory_gib": [rank["peak_memory_gib"] for rank in ranks],
        "losses": ranks[0]["losses"],
        "bubble_predicted": (stages - 1) / (stages - 1 + micro_batches * (layout.virtual_pipeline if layout else 1))
        if layout and layout.pipeline > 1
        else 0.0,
        "profile": [rank["profile"] for rank in ranks],
        "steps_measured": len(ranks[0]["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/lfm_3b_h200.yaml")
    parser.add_argument("--certify-config", default="configs/lfm_debug.yaml")
    parser.add_argument("--layouts", default="one,dp2_z1,ep2,tp2,pp2")
    parser.add_argument("--rows-per-gpu", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    flags = parser.parse_args()
    prepare_environment("cuda")
    from lfm.parallel.local_ranks import run_ranks
    from lfm.training.certificate import LAYOUTS, Problem, certify, in_one_process

    small = RunConfig.load(flags.certify_config)
    problem = Problem(small.model, small.optimizer, small.seed, rows=8, micro_batch_size=1, steps=1)
    expected = in_one_process(problem, "cuda")
    found, certificates = [], []
    for name in flags.layouts.split(","):
        layout, world, run = None, 1, RunConfig.load(flags.config, flags.overrides)
        if name != "one":
            world, parallel, _ = LAYOUTS[name]
            checked = check_layout(small.model, parallel, world, global_batch_size=8, micro_batch_size=1)
            finding = certify(checked, problem, expected, device_type="cuda")
            certificates.append(dataclasses.asdict(finding))
            print(f"{finding.layout}: {'; '.join(finding.beyond) or 'certified'} {finding.deviations}", flush=True)
            if finding.beyond:
                continue
            parallel = parallel.model_copy(update={"stage_layers": None})
        rows = flags.rows_per_gpu * world
        run = run.model_copy(update={"training": run.training.model_copy(update={"global_batch_size": rows})})
        if name != "one":
            size = run.training.micro_batch_size
            layout = check_layout(run.model, parallel, world, global_batch_size=rows, micro_batch_size=size)
        try:
            ranks = run_ranks(measure, world, run, layout, flags.warmup, flags.steps, timeout_seconds=400)
        except RuntimeError as error:
            print(f"{name} failed: {error}", flush=True)
            continue
        found.append(summary(run, name, layout, ranks))
        shown = {k: v for k, v in found[-1].items() if k not in ("profile", "losses")}
        print(json.dumps(shown), json.dumps(found[-1]["profile"]), flush=True)
        print("losses", [round(loss, 4) for loss in found[-1]["losses"]], flush=True)
        result = {
            "date": date.today().isoformat(),
            "environment": environment(),
            "config": run.model_dump(mode="json"),
            "runs": 1,
            "certificates": certificates,
            "layouts": found,
        }
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
