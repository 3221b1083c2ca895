"""LFM-3B on the GPUs of one host: `python benchmarks/scale_out.py --gpus 4 --out FILE [key.path=value ...]`.

1. The certificate on a small config over NCCL, in fp32 and bf16, for every layout below and every composed one that
   fits.
2. Steps of the full model under each layout on real packed rows with real routing, timed and then profiled; where
   experts are spread, with forced balance too.  A layout whose certificate is red gets no speed.  `one` is the local
   engine on one GPU with as many rows a GPU: what scaling is measured against.
3. A checkpoint saved under one layout and continued under others, by the commands a user types.
4. With `nccl` among the `--parts`: NCCL alone.  With `--baseline DIR`, a checkout of another commit: first the layouts
   of this call by its code.

Results gather in FILE, layout by layout, so that several short invocations (`--parts`, `--only`, `--minutes`) make one
record.  `--device cpu` with a small `--config` runs the same over gloo: a dry run, whose speeds mean nothing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from benchmarks.model.certified import Certifier, small_layout
from benchmarks.model.collectives import CONNECTIONS, measure_collectives
from benchmarks.model.command import report
from benchmarks.model.measure import Plan, measured_here, routings
from lfm.config import path_flag
from lfm.data.stream import open_split
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import expanded, ready_folder
from lfm.job.fork import run_ranks
from lfm.job.process import prepare_environment
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.language_model import Recompute
from lfm.training.certificate import LAYOUTS as CERTIFIED
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

PARTS = ("certificate", "nccl", "speed", "checkpoint")
DTYPES = ("float32", "bfloat16")

MOVES = {
    2: ("ep2", ["tp2", "pp2"]),
    4: ("tp2_pp2", ["ep4", "dp4_z3"]),
    8: ("tp2_pp2_ep2", ["ep8", "pp4_ep2"]),
}
"""GPUs -> the layout that saves a checkpoint, those that continue it."""

COLLECTIVE_MEGABYTES = (25, 50, 100, 200)
EXPECTED_SECONDS = 150.0
"""Of a layout of LFM-3B: building it, a first step that compiles, the timed and the profiled ones."""


def parallel_config(gpus: int, name: str) -> ParallelConfig:
    return ParallelConfig(**{"zero_stage": 1, **LAYOUTS[gpus][name]})


def certificates(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A finding for every layout of LAYOUTS and of the certificate with this number of processes, by dtype."""
    small, layouts = _small(flags), _to_certify(flags)
    for dtype in flags.certify_dtype:
        certifier = Certifier(small, flags.device, getattr(torch, dtype))
        for name, (parallel, recompute) in layouts.items():
            finding = certifier.certify(parallel, flags.gpus, recompute)
            yield {"name": f"{name} in {dtype}", "dtype": dtype, **asdict(finding)}


def _small(flags: argparse.Namespace) -> RunConfig:
    return RunConfig.load(flags.certify_config, CERTIFIED_OVERRIDES.get(flags.gpus, []))


def _to_certify(flags: argparse.Namespace) -> dict[str, tuple[ParallelConfig, Recompute]]:
    layouts: dict[str, tuple[ParallelConfig, Recompute]] = {}
    for name, (world, parallel, recompute) in CERTIFIED.items():
        if world == flags.gpus:
            layouts[name] = parallel, recompute
    for name in LAYOUTS[flags.gpus]:
        # The small config's stages are its own.
        whole = parallel_config(flags.gpus, name).model_copy(update={"stage_layers": None})
        if (whole, "none") not in layouts.values():
            layouts[name] = whole, "none"
    return {name: layout for name, layout in layouts.items() if not flags.only or name in flags.only}


def collectives(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """NCCL alone at the sizes that layouts of the model send, by CUDA_DEVICE_MAX_CONNECTIONS."""
    model = RunConfig.load(flags.config, flags.overrides).model
    gradients, unit = 4 * model.count_parameters().trainable, 10**6 if flags.device == "cuda" else 10**4
    gradients = gradients if flags.device == "cuda" else min(gradients, 10**6)
    sizes = {f"{size} MB": size * unit for size in COLLECTIVE_MEGABYTES}
    for connections in CONNECTIONS:
        given = (flags.device, connections, sizes, gradients, model.num_layers + 2)
        found = run_ranks(measure_collectives, flags.gpus, *given, timeout_seconds=flags.timeout)[0]
        print(f"CUDA_DEVICE_MAX_CONNECTIONS={connections}", flush=True)
        for row in found["rows"]:
            print(f"  {row['collective']} {row['size']}: {row['bus_gb_per_second']:.1f} GB/s", flush=True)
        buckets = found["reduce_scatter_in_buckets"]
        print(
            f"  reduce_scatter of {buckets['bytes'] / 1e9:.1f} GB in {buckets['buckets']} buckets: "
            f"{1e3 * buckets['seconds']:.1f} ms, {buckets['bus_gb_per_second']:.1f} GB/s"
        )
        for row in found["beside_products"]:
            times = ", ".join(f"{name} {1e3 * row[name]:.2f} ms" for name in ("alone", "products", "together"))
            print(f"  {row['collective']} beside products: {times}; {row['hidden']:.0%} hidden", flush=True)
        yield {"name": f"{connections} connections", **found}


def wanted(flags: argparse.Namespace) -> list[str]:
    return [name for name in ["one", *LAYOUTS[flags.gpus]] if not flags.only or name in flags.only]


def speeds(flags: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each layout made of the full model; one that is not certified, or fails, is reported and left out."""
    certified = result["certificates"]
    red = {finding["layout"]: finding["beyond"] for finding in certified if finding["beyond"]}
    green = {finding["layout"] for finding in certified} - set(red)
    estimate = max([row.get("seconds_taken", 0.0) for row in result["layouts"]], default=0.0) or EXPECTED_SECONDS
    left, names = [], wanted(flags)
    exchanges = any("expert" in LAYOUTS[flags.gpus].get(name, {}) for name in names)
    for name in names:
        run, layout, _ = _run(flags, name)
        if layout is not None and layout.name not in green:
            print(f"{name}: no speed, its certificate is {red.get(layout.name, 'missing')}", flush=True)
            continue
        if time.monotonic() + estimate > flags.end:
            left.append(name)
            continue
        print(f"{name}: about {estimate:.0f} s", flush=True)
        balanced_too = layout.expert > 1 if layout is not None else exchanges
        plan = Plan(flags.warmup, flags.steps, flags.profiled_steps, routings(run, "both" if balanced_too else "real"))
        began = time.monotonic()
        try:
            found = measured_here(run, layout, name, flags.device, plan, flags.timeout)
        except RuntimeError as error:
            print(f"{name} failed: {error}", flush=True)
            continue
        found["seconds_taken"] = time.monotonic() - began
        estimate = max(estimate, found["seconds_taken"]) if estimate != EXPECTED_SECONDS else found["seconds_taken"]
        print("\n".join(report(found, flags.device, random_ids=False)), flush=True)
        print("losses", [round(loss, 4) for loss in found["losses"]], f"{found['seconds_taken']:.0f} s", flush=True)
        yield found
    if left:
        print(f"no time for {', '.join(left)}: call again with --only {','.join(left)}", flush=True)


def before(flags: argparse.Namespace) -> dict[str, Any]:
    """The same layouts by the code of another checkout: what its own scale_out.py records."""
    folder = flags.baseline.resolve()
    out = flags.out.resolve().with_suffix(".before.json")
    path = RunConfig.load(flags.config, flags.overrides).data.path
    words = [sys.executable, "benchmarks/scale_out.py", "--gpus", flags.gpus, "--config", flags.config]
    words += ["--certify-config", flags.certify_config, "--device", flags.device, "--parts", "certificate,speed"]
    words += ["--only", ",".join(wanted(flags)), "--rows-per-gpu", flags.rows_per_gpu, "--warmup", flags.warmup]
    words += ["--steps", flags.steps, "--timeout", flags.timeout, "--out", out, *flags.overrides]
    # Paths of a config are from where a command starts.
    words += [f"data.path={expanded(path).resolve()}"] if path is not None else []
    shown = [str(word) for word in words]
    print(f"{folder}: {' '.join(shown)}", flush=True)
    done = subprocess.run(shown, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})
    if done.returncode:
        raise SystemExit(f"{folder}: its benchmark ended with exit code {done.returncode}")
    found = json.loads(out.read_text(encoding="utf-8"))
    return {key: found[key] for key in ("date", "environment", "config", "certificates", "layouts")}


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
    half = run.dtype.itemsize == 2
    try:
        return run, check_layout(run.model, parallel, world, **sizes, half=half, card=card), world
    except UserError as error:
        raise UserError(f"layout {name} of {flags.rows_per_gpu} rows a GPU: {error}") from None


def moved_checkpoint(flags: argparse.Namespace) -> dict[str, Any]:
    """Losses by step: of the run that saved, and of those that went on from its checkpoint under other layouts."""
    saves, continues = MOVES[flags.gpus]
    name = f"scale_out_{flags.gpus}_{saves}"
    names = {each: layout.name for each in (saves, *continues) if (layout := _run(flags, each)[1]) is not None}
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
    result = {"saved_under": names[saves], "after_step": 4, "losses": {names[saves]: first}}
    for other in continues:
        resume = f"checkpoint.resume=runs/{name}"
        losses = _pretrain(flags, other, [*common, f"name={name}_{other}", "checkpoint.every_steps=0", resume])
        result["losses"][names[other]] = losses
        print(f"{names[saves]} {first}\n{names[other]} {losses}", flush=True)
    return result


def _pretrain(flags: argparse.Namespace, name: str, overrides: list[str]) -> dict[int, float]:
    keys = {"zero_stage": 1, **LAYOUTS[flags.gpus][name]}
    shown = [f"parallel.{key}={json.dumps(value)}" for key, value in keys.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(flags.gpus)]
    words = [*torchrun, "launch/pretrain.py", "--config", flags.config, *overrides, *shown]
    print(" ".join(words), flush=True)
    try:
        done = subprocess.run(
            words,
            encoding="utf-8",
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=flags.timeout,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: its training took more than --timeout {flags.timeout:g} s; raise it") from None
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


def check(flags: argparse.Namespace) -> None:
    """Raises UserError for what would otherwise end the work in the middle of it."""
    for name, least in (("rows_per_gpu", 1), ("warmup", 1), ("steps", 1), ("profiled_steps", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)} is less than {least}")
    if not flags.minutes > 0:
        raise UserError(f"--minutes {flags.minutes:g} leaves no time; give more than 0")
    if not 0 < flags.timeout < math.inf:
        raise UserError(f"--timeout {flags.timeout:g} is no number of seconds; give more than 0")
    here = {name for name, (world, _, _) in CERTIFIED.items() if world == flags.gpus}
    for flag, given, known in (
        ("--only", flags.only, ["one", *LAYOUTS[flags.gpus], *sorted(here - set(LAYOUTS[flags.gpus]))]),
        ("--parts", flags.parts, PARTS),
        ("--certify-dtype", flags.certify_dtype, DTYPES),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            raise UserError(f"{flag} {unknown[0]} is not one of {', '.join(known)}")
    if flags.baseline is not None and not (flags.baseline / "benchmarks/scale_out.py").exists():
        raise UserError(f"--baseline {flags.baseline} is no checkout of this repository; make one by git worktree add")
    ready_folder(flags.out.parent)
    if flags.device == "cuda" and torch.cuda.device_count() < flags.gpus:
        raise UserError(
            f"--gpus {flags.gpus}: {torch.cuda.device_count()} are visible; give fewer, or --device cpu for a dry run"
        )
    names = wanted(flags) if "speed" in flags.parts else []
    if "checkpoint" in flags.parts:
        saves, continues = MOVES[flags.gpus]
        names += [saves, *continues]
    for name in names:
        run, _, _ = _run(flags, name)
        open_split(run.data, "train", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    if "certificate" in flags.parts:
        small = _small(flags)
        for parallel, _ in _to_certify(flags).values():
            for dtype in flags.certify_dtype:
                small_layout(small, parallel, flags.gpus, getattr(torch, dtype))


def recorded(path: Path) -> dict[str, Any]:
    """What earlier calls have written.  Raises UserError for a file of something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--out {path} is no record of this benchmark, to which it would be added; give another file")
    return found


def _listed(text: str) -> list[str]:
    return text.split(",")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=LAYOUTS, required=True)
    parser.add_argument("--config", default="configs/lfm_3b_h200.yaml")
    parser.add_argument("--certify-config", default="configs/lfm_debug.yaml")
    parser.add_argument("--certify-dtype", type=_listed, default=[*DTYPES])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", type=_listed, default=["certificate", "speed", "checkpoint"])
    parser.add_argument("--only", type=_listed, default=[], help="names of layouts")
    parser.add_argument("--rows-per-gpu", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profiled-steps", type=int, default=1)
    parser.add_argument(
        "--baseline", type=path_flag, metavar="DIR", help="a checkout of another commit, measured first"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no layout that would take longer")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one layout may take")
    parser.add_argument("--out", type=path_flag, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    flags = parser.parse_intermixed_args()
    prepare_environment(flags.device)
    check(flags)
    flags.end = time.monotonic() + 60 * flags.minutes
    result = recorded(flags.out)
    result.setdefault("certificates", [])
    result.setdefault("layouts", [])
    result.setdefault("nccl", [])

    def keep(key: str, found: Iterable[dict[str, Any]]) -> None:
        """Replace the rows of the same names, each as soon as it is there, and write."""
        for new in found:
            result[key] = [row for row in result[key] if row["name"] != new["name"]] + [new]
            write()

    def write() -> None:
        config = RunConfig.load(flags.config, flags.overrides).model_dump(mode="json")
        result.update(date=date.today().isoformat(), environment=environment(), config=config, runs=1)
        flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if flags.baseline is not None:
        result["before"] = before(flags)
        write()
    if "nccl" in flags.parts:
        keep("nccl", collectives(flags))
    if "certificate" in flags.parts:
        keep("certificates", certificates(flags))
    if "speed" in flags.parts:
        keep("layouts", speeds(flags, result))
    if "checkpoint" in flags.parts:
        result["checkpoint_moved"] = moved_checkpoint(flags)
        write()


if __name__ == "__main__":
    main()
