"""Certify layouts: `python launch/certify.py --config configs/lfm_debug.yaml --layouts all [key.path=value ...]`.

Runs each layout as processes of this machine (gloo on CPUs, NCCL with one GPU each) and compares one optimizer step
with one process, number by number; exit code 1 when one is out of bounds.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.config import parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.job.process import prepare_environment, require_packages

if TYPE_CHECKING:
    from lfm.training.certificate import Finding

DTYPES = ("float32", "bfloat16")


@command
def main() -> None:
    # CUDA must not start in this process, or it could not fork; with this, asking for a GPU does not start it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from lfm.training.run import RunConfig, environment

    run, flags = parse_command_line(
        RunConfig,
        "Compare parallel layouts with one process.",
        layouts={"default": "all", "metavar": "NAME,...", "help": "all, or names; a wrong one lists them"},
        dtype={"default": "float32", "metavar": "NAME,...", "help": "float32, bfloat16 or both, which have own bounds"},
        steps={"type": int, "default": 3, "metavar": "N", "help": "optimizer steps; after the first, drift is shown"},
        json={"metavar": "FILE", "help": "write the numbers here"},
        plant={"metavar": "FAULT", "help": "plant a silent mistake, to see it found"},
    )
    if not 1 <= flags.steps <= 1000:
        raise UserError(f"--steps {flags.steps} is not from 1 to 1000: the first is what the bounds are for")
    dtypes = flags.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if run.training.dtype not in ("auto", flags.dtype):
        raise UserError(
            f"training.dtype={run.training.dtype} differs from --dtype {flags.dtype}, which certify goes by; leave "
            "training.dtype out"
        )
    require_packages()
    prepare_environment(run.device.type)
    from lfm.training.certificate import write_json

    start = time.monotonic()
    findings = {dtype: _findings(run, flags, dtype) for dtype in dtypes}
    if flags.json is not None:
        write_json(Path(flags.json), findings, {"environment": environment(), "config": run.model_dump(mode="json")})
    together = [finding for found in findings.values() for finding in found]
    failed = [finding.layout for finding in together if finding.beyond]
    print(f"{len(together) - len(failed)} of {len(together)} layouts within bounds, {time.monotonic() - start:.0f} s")
    if failed:
        print(f"out of bounds: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _findings(run: Any, flags: Any, dtype_name: str) -> "list[Finding]":
    """Of every layout that is asked for, told as they come; where all are, of those that suit the model."""
    import torch

    from lfm.layout.layout import check_layout
    from lfm.training.certificate import LAYOUTS, Problem, bounds, certify, in_one_process, suits
    from lfm.training.certificate_faults import FAULTS
    from lfm.training.parallel_engine import ParallelEngine

    dtype, everything = getattr(torch, dtype_name), flags.layouts == "all"
    names = [name for name in LAYOUTS if suits(run.model, name, dtype)] if everything else flags.layouts.split(",")
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"--layouts {name} is not one of {', '.join(LAYOUTS)}")
    if flags.plant is not None and flags.plant not in FAULTS:
        raise UserError(f"--plant {flags.plant} is not one of {', '.join(FAULTS)}")
    engine_type = ParallelEngine if flags.plant is None else FAULTS[flags.plant]
    expected, told, findings = None, None, []
    for name in names:
        world, parallel, recompute = LAYOUTS[name]
        problem = Problem(
            model=run.model,
            optimizer=run.optimizer,
            seed=run.seed,
            rows=8,
            micro_batch_size=1,
            steps=flags.steps,
            dtype=dtype,
            recompute=recompute,
        )
        half = dtype.itemsize == 2
        layout = check_layout(run.model, parallel, world, global_batch_size=8, micro_batch_size=1, half=half)
        if told is not bounds(dtype, layout):
            told = bounds(dtype, layout)
            print(f"bounds in {dtype_name}: {', '.join(f'{k} {bound:.0e}' for k, bound in told.items())}", flush=True)
        # Recomputation has the same result, so that one reference serves all.
        expected = expected or in_one_process(problem, run.device.type)
        began = time.monotonic()
        findings.append(certify(layout, problem, expected, device_type=run.device.type, engine_type=engine_type))
        _tell(findings[-1], time.monotonic() - began)
    return findings


def _tell(finding: "Finding", seconds: float) -> None:
    shown = "  ".join(f"{key} {value:.1e}" for key, value in finding.deviations.items())
    drift = " ".join(f"{value:.0e}" for value in finding.drift)
    verdict = "BEYOND" if finding.beyond else "ok"
    print(f"{verdict:6} {finding.layout}: {shown}  (worst gradient {finding.worst_gradient}; loss drift {drift}; "
          f"{seconds:.0f} s)", flush=True)  # fmt: skip
    for sentence in finding.beyond:
        print(f"       {sentence}", flush=True)
