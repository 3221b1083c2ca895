"""Certify layouts: `python launch/certify.py --config configs/lfm_debug.yaml --layouts all [key.path=value ...]`.

Runs each layout as processes of this machine (gloo on CPUs, NCCL with one GPU each) and compares one optimizer step
with one process, number by number; exit code 1 when one is out of bounds.
"""

import os
import sys
import time
from pathlib import Path

from lfm.config import parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.job.process import prepare_environment, require_packages


@command
def main() -> None:
    # CUDA must not start in this process, or it could not fork; with this, asking for a GPU does not start it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from lfm.training.run import RunConfig, environment

    run, flags = parse_command_line(
        RunConfig,
        "Compare parallel layouts with one process.",
        layouts={"default": "all", "metavar": "NAME,...", "help": "all, or names; a wrong one lists them"},
        steps={"type": int, "default": 3, "metavar": "N", "help": "optimizer steps; after the first, drift is shown"},
        json={"metavar": "FILE", "help": "write the numbers here"},
        plant={"metavar": "FAULT", "help": "plant a silent mistake, to see it found"},
    )
    if not 1 <= flags.steps <= 1000:
        raise UserError(f"--steps {flags.steps} is not from 1 to 1000: the first is what the bounds are for")
    require_packages()
    prepare_environment(run.device.type)
    from lfm.layout.layout import check_layout
    from lfm.training.certificate import BOUNDS, LAYOUTS, Problem, certify, in_one_process, suits, write_json
    from lfm.training.certificate_faults import FAULTS
    from lfm.training.parallel_engine import ParallelEngine

    everything = flags.layouts == "all"
    names = [name for name in LAYOUTS if suits(run.model, name)] if everything else flags.layouts.split(",")
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"--layouts {name} is not one of {', '.join(LAYOUTS)}")
    if flags.plant is not None and flags.plant not in FAULTS:
        raise UserError(f"--plant {flags.plant} is not one of {', '.join(FAULTS)}")
    if run.dtype.itemsize < 4:
        raise UserError(f"training.dtype={run.training.dtype} is too coarse to certify; use training.dtype=float32")

    print(f"bounds: {', '.join(f'{key} {bound:.0e}' for key, bound in BOUNDS.items())}", flush=True)
    engine_type = ParallelEngine if flags.plant is None else FAULTS[flags.plant]
    expected, findings, start = None, [], time.monotonic()
    for name in names:
        world, parallel, recompute = LAYOUTS[name]
        problem = Problem(
            model=run.model,
            optimizer=run.optimizer,
            seed=run.seed,
            rows=8,
            micro_batch_size=1,
            steps=flags.steps,
            recompute=recompute,
        )
        layout = check_layout(run.model, parallel, world, global_batch_size=8, micro_batch_size=1)
        # Recomputation has the same result, so that one reference serves all.
        expected = expected or in_one_process(problem, run.device.type)
        began = time.monotonic()
        finding = certify(layout, problem, expected, device_type=run.device.type, engine_type=engine_type)
        findings.append(finding)
        shown = "  ".join(f"{key} {value:.1e}" for key, value in finding.deviations.items())
        drift = " ".join(f"{value:.0e}" for value in finding.drift)
        verdict = "BEYOND" if finding.beyond else "ok"
        print(f"{verdict:6} {finding.layout}: {shown}  (worst gradient {finding.worst_gradient}; loss drift {drift}; "
              f"{time.monotonic() - began:.0f} s)", flush=True)  # fmt: skip
        for sentence in finding.beyond:
            print(f"       {sentence}", flush=True)
    if flags.json is not None:
        write_json(Path(flags.json), findings, {"environment": environment(), "config": run.model_dump(mode="json")})
    failed = [finding.layout for finding in findings if finding.beyond]
    print(f"{len(findings) - len(failed)} of {len(findings)} layouts within bounds, {time.monotonic() - start:.0f} s")
    if failed:
        print(f"out of bounds: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)
