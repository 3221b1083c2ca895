"""LFM-3B on the GPUs of one host: `python benchmarks/scale_out.py --gpus 4 --out FILE [key.path=value ...]`.

1. The certificate on a small config over NCCL, for every layout below and every composed one that fits.
2. Steps of the full model under each layout on real packed rows with real routing, one of them profiled; a layout
   whose certificate is red gets no speed.  `one` is the local engine on one GPU with as many rows a GPU: what scaling
   is measured against.
3. A checkpoint saved under one layout and continued under others, by the commands a user types.

Results gather in FILE, part by part, so that several short invocations (`--parts`, `--only`) make one record.
`--device cpu` with a small `--config` runs the same over gloo: a dry run, whose speeds mean nothing.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from lfm.data.stream import BatchStream, open_split
from lfm.job.fork import run_ranks
from lfm.job.process import Process, prepare_environment
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.language_model import Recompute
from lfm.training.certificate import LAYOUTS as CERTIFIED
from lfm.training.certificate import Problem, certify, in_one_process
from lfm.training.metrics import peak_flops
from lfm.training.run import RunConfig, environment

TP2, TP4 = ({"tensor": size, "sequence_parallel": True} for size in (2, 4))
PP2, PP4 = {"pipeline": 2}, {"pipeline": 4}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp2_z1": {}, "ep2": {"expert": 2}, "tp2": TP2, "pp2": PP2, "pp2_vp2": PP2 | {"virtual_pipeline": 2}},
    4: {
        "dp4_z1": {},
        "ep4": {"expert": 4},
        "ep2_world4": {"expert": 2},
        "tp2_dp2": TP2,
        "tp2_ep2_dp2": TP2 | {"expert": 2},
        "tp2_ep4": TP2 | {"expert": 4},
        "pp2_dp2": PP2,
        "pp2_vp2_dp2": PP2 | {"virtual_pipeline": 2},
        "pp2_ep2": PP2 | {"expert": 2},
        "pp4_7661": PP4 | {"stage_layers": (7, 6, 6, 1)},
        "pp4": PP4,
        "tp2_pp2": TP2 | PP2,
        "dp4_z2": {"zero_stage": 2},
        "dp4_z3": {"zero_stage": 3},
    },
    8: {
        "dp8_z1": {},
        "ep8": {"expert": 8},
        "ep4_world8": {"expert": 4},
        "tp2_pp2_ep2": TP2 | PP2 | {"expert": 2},
        "pp4_ep2": PP4 | {"expert": 2},
        "tp4_dp2": TP4,
    },
}
"""GPUs -> name -> `parallel` keys; ZeRO-1 and automatic stages unless they say otherwise."""

CERTIFIED_OVERRIDES = {8: ["model.ffn.num_moe_experts=8", "model.attention.num_query_groups=4"]}
"""What the small config needs to be cut eight ways."""

MOVES = {
    2: ("ep2", ["tp2", "pp2"]),
    4: ("tp2_pp2", ["ep4", "dp4_z3"]),
    8: ("tp2_pp2_ep2", ["ep8", "pp4_ep2"]),
}
"""GPUs -> the layout that saves a checkpoint, those that continue it."""


def parallel_config(gpus: int, name: str) -> ParallelConfig:
    return ParallelConfig(**{"zero_stage": 1, **LAYOUTS[gpus][name]})


def certificates(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A finding for every layout of LAYOUTS and of the certificate with this number of processes."""
    small = RunConfig.load(flags.certify_config, CERTIFIED_OVERRIDES.get(flags.gpus, []))
    layouts: dict[str, tuple[ParallelConfig, Recompute]] = {}
    for name, (world, parallel, recompute) in CERTIFIED.items():
        if world == flags.gpus:
            layouts[name] = parallel, recompute
    for name in LAYOUTS[flags.gpus]:
        # The small config's stages are its own.
        whole = parallel_config(flags.gpus, name).model_copy(update={"stage_layers": None})
        if (whole, "none") not in layouts.values():
            layouts[name] = whole, "none"
    expected = None
    for name, (parallel, recompute) in layouts.items():
        if flags.only and name not in flags.only:
            continue
        problem = Problem(
            small.model, small.optimizer, small.seed, rows=8, micro_batch_size=1, steps=1, recompute=recompute
        )
        expected = expected or in_one_process(problem, flags.device)
        layout = check_layout(small.model, parallel, flags.gpus, global_batch_size=8, micro_batch_size=1)
        began = time.monotonic()
        finding = certify(layout, problem, expected, device_type=flags.device)
        deviations = " ".join(f"{key} {value:.1e}" for key, value in finding.deviations.items())
        verdict = "; ".join(finding.beyond) or "certified"
        print(f"{finding.layout}: {verdict}: {deviations} ({time.monotonic() - began:.0f} s)", flush=True)
        yield {"name": name, **dataclasses.asdict(finding)}


def measure(
    process: Process, run: RunConfig, layout: Layout | None, device_type: str, warmup: int, steps: int
) -> dict[str, Any]:
    """One process's figures: seconds a step, losses, peak memory, and how the profiled step was spent."""
    began = time.monotonic()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    device = torch.device(device_type, process.local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how: dict[str, Any] = {
        "seed": run.seed,
        "dtype": run.dtype,
        "micro_batch_size": run.training.micro_batch_size,
        "recompute": run.training.recompute,
    }
    leave = None
    if layout is None:
        from lfm.training.local_engine import LocalEngine

        engine: Any = LocalEngine(run.model, run.optimizer, device=device, **how)
    else:
        from lfm.parallel import groups
        from lfm.training.parallel_engine import ParallelEngine

        groups.join(process, device, timeout_seconds=300)
        leave = groups.leave
        engine = ParallelEngine(run.model, run.optimizer, groups.make_groups(layout, device), **how)
    model, rows_per_step = run.model, run.training.global_batch_size
    rows = open_split(run.data, "train", seq_length=model.seq_length, vocab_size=model.vocab_size)
    stream = BatchStream(
        rows,
        seed=run.seed,
        rows_per_step=rows_per_step,
        take=engine.rows_of_step(rows_per_step),
        prefetch_threads=2,
    )
    seconds, schedule, stage, losses, imbalance, pairs = [], [], [], [], [], 0

    def one_step() -> None:
        nonlocal pairs
        batch = stream.next()
        start = engine.synchronize()
        with _in_stage(device) as in_stage:
            result = engine.forward_backward(batch)
            middle = engine.synchronize()
        engine.step(1e-5)
        seconds.append(engine.synchronize() - start)
        schedule.append(middle - start)
        stage.append(in_stage())
        losses.append(result.terms["cross_entropy"])
        loads = result.measured["expert_load"].values()
        imbalance.append(statistics.mean(max(load) * len(load) / sum(load) for load in loads))
        pairs = result.attended_pairs

    one_step()
    first_step = time.monotonic() - began
    for _ in range(warmup + steps - 1):
        one_step()
    profiled = _profile(one_step) if device.type == "cuda" else None
    stream.close()
    if leave is not None:
        torch.distributed.barrier()
        leave()
    measured = slice(warmup, warmup + steps)
    return {
        "seconds": seconds[measured],
        "schedule_seconds": schedule[measured],
        "in_stage_seconds": stage[measured],
        "losses": losses,
        "expert_load_max_over_mean": imbalance,
        "attended_pairs": pairs,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "seconds_to_first_step": first_step,
        "profile": profiled,
    }


@contextmanager
def _in_stage(device: torch.device) -> Iterator[Any]:
    """Yields a function: seconds that pipeline schedules spent inside this stage's forward and backward passes.

    What a schedule does outside them is waiting for another stage: the bubble, imbalance and transfers.
    """
    from megatron.core.pipeline_parallel import schedules

    spans: list[tuple[Any, Any]] = []
    originals = schedules.forward_step, schedules.backward_step

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = mark()
            result = function(*args, **kwargs)
            spans.append((start, mark()))
            return result

        return call

    schedules.forward_step, schedules.backward_step = (timed(function) for function in originals)
    try:
        yield lambda: sum(a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in spans)
    finally:
        schedules.forward_step, schedules.backward_step = originals


def _profile(one_step: Any) -> dict[str, float]:
    """Shares of one step's wall time on this GPU: kernels that compute, communication alone, neither."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        one_step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    spans: dict[str, list[tuple[float, float]]] = {"compute": [], "collective": [], "send_receive": []}
    # The raw records: building the profiler's own event tree of half a million kernels takes minutes.
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() != DeviceType.CUDA or event.duration_ns() <= 0:
            continue
        kind, name = "compute", event.name().lower()
        if "nccl" in name:
            kind = "send_receive" if "sendrecv" in name else "collective"
        spans[kind].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    everything = [span for kind in spans.values() for span in kind]
    first, last = min(s for s, _ in everything), max(e for _, e in everything)
    length = last - first
    busy = _covered(spans["compute"])
    return {
        "wall_seconds": wall,
        "compute": busy / length,
        # Communication that no computation hides.
        "collective": (_covered(spans["compute"] + spans["collective"]) - busy) / length,
        "send_receive": (_covered(everything) - _covered(spans["compute"] + spans["collective"])) / length,
        "idle": 1 - _covered(everything) / length,
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
    peak = peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    found = {
        "name": name,
        "layout": layout.name if layout else "one GPU, local engine",
        "describe": layout.describe() if layout else "",
        "gpus": world,
        "tokens_per_step": tokens,
        "tokens_per_second_per_gpu": rate,
        "range": [tokens / s / world for s in (max(ranks[0]["seconds"]), min(ranks[0]["seconds"]))],
        "mfu_attended": rate * run.model.flops_per_token(attended=attended) / peak if peak else None,
        "mfu_if_rows_were_one_document": rate * run.model.flops_per_token() / peak if peak else None,
        "schedule_share": statistics.median(ranks[0]["schedule_seconds"]) / seconds,
        "peak_memory_gib": [rank["peak_memory_gib"] for rank in ranks],
        "losses": ranks[0]["losses"],
        # Mean over layers, by step.
        "expert_load_max_over_mean": ranks[0]["expert_load_max_over_mean"],
        "seconds_to_first_step": max(rank["seconds_to_first_step"] for rank in ranks),
        "profile": [rank["profile"] for rank in ranks],
        "steps_measured": len(ranks[0]["seconds"]),
    }
    if layout is not None and layout.pipeline > 1:
        work = layout.num_micro_batches * layout.virtual_pipeline
        found["bubble_predicted"] = (layout.pipeline - 1) / (layout.pipeline - 1 + work)
        # A stage with less work waits too: this is the bubble if all stages worked as long as the slowest.
        found["waiting_predicted"] = 1 - (1 - found["bubble_predicted"]) * layout.balance
        found["waiting"] = [
            1
            - statistics.median(a / b for a, b in zip(rank["in_stage_seconds"], rank["schedule_seconds"], strict=True))
            for rank in ranks
        ]
    return found


def speeds(flags: argparse.Namespace, certified: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What each layout made of the full model; one that is not certified, or fails, is reported and left out."""
    red = {finding["name"]: finding["beyond"] for finding in certified if finding["beyond"]}
    green = {finding["layout"] for finding in certified if not finding["beyond"]}
    for name in ["one", *LAYOUTS[flags.gpus]]:
        if flags.only and name not in flags.only:
            continue
        run, layout, world = _run(flags, name)
        if layout is not None and layout.name not in green:
            print(f"{name}: no speed, its certificate is {red.get(name, 'missing')}", flush=True)
            continue
        began = time.monotonic()
        try:
            ranks = run_ranks(
                measure, world, run, layout, flags.device, flags.warmup, flags.steps, timeout_seconds=flags.timeout
            )
        except RuntimeError as error:
            print(f"{name} failed: {error}", flush=True)
            continue
        found = summary(run, name, layout, ranks)
        shown = {key: value for key, value in found.items() if not isinstance(value, (list, str))}
        print(json.dumps(shown), f"{time.monotonic() - began:.0f} s", flush=True)
        print("  losses", [round(loss, 4) for loss in found["losses"]], flush=True)
        for rank, part in enumerate(found["profile"]):
            print(f"  rank {rank}", {key: round(value, 3) for key, value in (part or {}).items()}, flush=True)
        yield found


def _run(flags: argparse.Namespace, name: str) -> tuple[RunConfig, Layout | None, int]:
    run, world = RunConfig.load(flags.config, flags.overrides), 1 if name == "one" else flags.gpus
    rows = flags.rows_per_gpu * world
    run = run.model_copy(update={"training": run.training.model_copy(update={"global_batch_size": rows})})
    if name == "one":
        return run, None, world
    size = run.training.micro_batch_size
    parallel = parallel_config(flags.gpus, name)
    card = run.card if flags.device == "cuda" else None
    sizes = {"global_batch_size": rows, "micro_batch_size": size}
    return run, check_layout(run.model, parallel, world, **sizes, card=card), world


def moved_checkpoint(flags: argparse.Namespace) -> dict[str, Any]:
    """Losses by step: of the run that saved, and of those that went on from its checkpoint under other layouts."""
    saves, continues = MOVES[flags.gpus]
    name = f"scale_out_{flags.gpus}_{saves}"
    _, layout, _ = _run(flags, saves)
    common = [
        *flags.overrides,
        f"training.global_batch_size={flags.rows_per_gpu * flags.gpus}",
        "training.steps=7",
        "schedule.warmup_steps=4",
        "logging.every_steps=1",
        "validation.every_steps=0",
        "validation.max_rows=4",
        "samples.prompts=[]",
        "checkpoint.save_at_end=false",
        f"training.device={flags.device}",
    ]
    first = _pretrain(flags, saves, [*common, f"name={name}", "checkpoint.every_steps=4", "checkpoint.resume=never"])
    result = {"saved_under": layout.name if layout else "", "after_step": 4, "losses": {saves: first}}
    for other in continues:
        resume = f"checkpoint.resume=runs/{name}"
        losses = _pretrain(flags, other, [*common, f"name={name}_{other}", "checkpoint.every_steps=0", resume])
        result["losses"][other] = losses
        print(f"{saves} {first}\n{other} {losses}", flush=True)
    return result


def _pretrain(flags: argparse.Namespace, name: str, overrides: list[str]) -> dict[int, float]:
    keys = {"zero_stage": 1, **LAYOUTS[flags.gpus][name]}
    shown = [f"parallel.{key}={json.dumps(value)}" for key, value in keys.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(flags.gpus)]
    command = [*torchrun, "launch/pretrain.py", "--config", flags.config, *overrides, *shown]
    print(" ".join(command), flush=True)
    done = subprocess.run(
        command,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=flags.timeout,
    )
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
        raise SystemExit(f"{name}: exit code {done.returncode}")
    run = RunConfig.load(flags.config, overrides)
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if "save_stall_seconds" in record:
            print(f"saving held training {record['save_stall_seconds']:.1f} s", flush=True)
    return {record["step"]: record["cross_entropy"] for record in records if "cross_entropy" in record}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=LAYOUTS, required=True)
    parser.add_argument("--config", default="configs/lfm_3b_h200.yaml")
    parser.add_argument("--certify-config", default="configs/lfm_debug.yaml")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default="certificate,speed,checkpoint", help="of these, in this order")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="names of layouts")
    parser.add_argument("--rows-per-gpu", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one layout may take")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    flags = parser.parse_intermixed_args()
    unknown = set(flags.only) - {"one", *LAYOUTS[flags.gpus], *CERTIFIED}
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: not one of one,{','.join(LAYOUTS[flags.gpus])}")
    prepare_environment(flags.device)
    result: dict[str, Any] = json.loads(flags.out.read_text(encoding="utf-8")) if flags.out.exists() else {}
    result.setdefault("certificates", [])
    result.setdefault("layouts", [])

    def keep(key: str, found: Iterable[dict[str, Any]]) -> None:
        """Replace the rows of the same names, each as soon as it is there, and write."""
        for new in found:
            result[key] = [row for row in result[key] if row["name"] != new["name"]] + [new]
            write()

    def write() -> None:
        config = RunConfig.load(flags.config, flags.overrides).model_dump(mode="json")
        result.update(date=date.today().isoformat(), environment=environment(), config=config, runs=1)
        flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    parts = flags.parts.split(",")
    if "certificate" in parts:
        keep("certificates", certificates(flags))
    if "speed" in parts:
        keep("layouts", speeds(flags, result["certificates"]))
    if "checkpoint" in parts:
        result["checkpoint_moved"] = moved_checkpoint(flags)
        write()


if __name__ == "__main__":
    main()
