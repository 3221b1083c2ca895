"""`python launch/bench.py --model`: speed and waterfall of a config's model under its layout."""

import argparse
import json
from datetime import date
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.model.measure import Plan, check_data, measure, measured_here, routings, summary
from benchmarks.model.waterfall import table
from lfm.errors import UserError
from lfm.files import write_durably
from lfm.job.process import Process, prepare_environment, require_packages
from lfm.layout.layout import Layout, check_layout
from lfm.training.run import RunConfig, environment

_TIMEOUT_SECONDS = 1800


def bench_model(flags: argparse.Namespace) -> None:
    """Raises UserError where the layout is not legal, or its certificate red."""
    run, process = RunConfig.load(flags.model, flags.overrides), Process.from_environment()
    if flags.gpus is not None and process.world_size > 1:
        raise UserError(
            f"--gpus {flags.gpus} starts processes, and a launcher has started {process.world_size}; omit it"
        )
    world = process.world_size if flags.gpus is None else flags.gpus
    if run.parallel.tensor > 1:  # before the card's name is asked for, which starts CUDA
        prepare_environment(run.device.type, tensor=run.parallel.tensor)
    layout = _layout(run, world)
    if flags.random_ids is False:
        check_data(run)
    device_type = _device_type(run, process.local_world_size if flags.gpus is None else flags.gpus)
    chosen = routings(run, flags.routing)
    plan = Plan(flags.warmup, flags.steps, flags.profiled_steps, chosen, flags.random_ids)
    if layout is not None:
        require_packages()
    if layout is not None or device_type == "cpu":
        prepare_environment(device_type)
    if layout is not None and process.rank == 0:
        from benchmarks.model.certified import require_certificate  # needs what a single process does without

        require_certificate(run, world, device_type)
    if process.world_size > 1:
        found = _among_launched(process, run, layout, device_type, plan)
        if found is None:
            return
    else:
        found = measured_here(run, layout, run.name, device_type, plan, _TIMEOUT_SECONDS)
    print("\n".join(report(found, device_type, random_ids=flags.random_ids)), flush=True)
    if flags.out is not None:
        about = {
            "date": date.today().isoformat(),
            "environment": environment(),
            "runs": 1,
            "random_ids": plan.random_ids,
        }
        content = about | {"config": run.model_dump(mode="json"), "layouts": [found]}
        write_durably(flags.out, json.dumps(content, indent=1).encode() + b"\n")
    if flags.plot is not None:
        from benchmarks.model.plot import plot_waterfalls

        plot_waterfalls(columns(found), f"{run.name}, {found['layout']}", flags.plot)


def _layout(run: RunConfig, world: int) -> Layout | None:
    """None: the local engine."""
    if world < 1:
        raise UserError(f"--gpus {world} is no number of processes; give 1 or more")
    training = run.training
    layout = check_layout(
        run.model,
        run.parallel,
        world,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        half=run.dtype.itemsize == 2,
        card=run.card,
    )
    return None if layout.zero_stage == 0 else layout


def _device_type(run: RunConfig, here: int) -> str:
    """`here`: processes of this machine."""
    device, visible = run.device.type, torch.cuda.device_count()
    if device == "cuda" and visible < here:
        raise UserError(
            f"{here} processes of this machine want a GPU each and {visible} are visible; start fewer, or set "
            "training.device=cpu"
        )
    return device


def _among_launched(
    process: Process, run: RunConfig, layout: Layout | None, device_type: str, plan: Plan
) -> dict[str, Any] | None:
    """The summary, in the launcher's first process alone."""
    gathered: list[Any] = [None] * process.world_size

    def gather(own: dict[str, Any]) -> None:
        dist.all_gather_object(gathered, own)

    measure(process, run, layout, device_type, plan, gather=gather)
    return summary(run, run.name, layout, gathered) if process.rank == 0 else None


def columns(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds by part, by routing."""
    others = {name: found[name]["waterfall"]["parts"] for name in ("balanced",) if name in found}
    return {f"{found['routing']} routing": found["waterfall"]["parts"]} | {
        f"{name} routing": parts for name, parts in others.items()
    }


def report(found: dict[str, Any], device_type: str, *, random_ids: bool) -> list[str]:
    """For people."""
    lines = [f"{found['name']}, {found['describe'] or found['layout']}, {found['tokens_per_step']:,} tokens a step"]
    if device_type != "cuda":
        lines.append("a dry run without GPUs: operations of the CPU stand for kernels, and speeds mean nothing")
    if random_ids:
        lines.append("rows of random ids, each one document")
    for name in (found["routing"], "balanced"):
        row = found if name == found["routing"] else found.get(name)
        if row is None:
            continue
        slow, fast = row["range"]
        mfu = f", MFU {row['mfu_attended']:.1%} of attended pairs" if row["mfu_attended"] else ""
        loads = row["expert_load_max_over_mean"]
        load = f", load {sum(loads) / len(loads):.2f} (max over mean)" if loads else ""
        memory = [peak for peak in row["peak_memory_gib"] if peak is not None]
        peak = f", peak {max(memory):.1f} GiB" if memory else ""
        lines.append(
            f"{name} routing: {row['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU ({slow:,.0f} to {fast:,.0f})"
            f"{mfu}{load}{peak}, median of {row['steps_measured']} steps"
        )
        fall = row["waterfall"]
        lines.append(
            f"  profiled step {fall['profiled_ms']:,.1f} ms, of it {fall['gaps_profiled_ms']:,.1f} of host gaps, "
            f"{fall['kernels']:,} kernels; below, host gaps are what the timed step leaves"
        )
        if found["routing"] == "balanced":
            break
    return [*lines, *table(columns(found))]
