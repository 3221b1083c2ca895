"""Ablate: `python launch/ablate.py --config configs/ablation/families.yaml [--plan]`: arms compared on equal terms.

Every arm is trained at several learning rates, and at its best with further seeds, on the same rows in the same order.
The same command goes on where it was stopped, however that was.
"""

import sys

from lfm.config import parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.experiments.ablation import AblationConfig

DESCRIPTION = """Train and compare the arms of a set: same rows, same order, matched sizes, rates and seeds for each."""


@command
def main() -> None:
    ablation, flags = parse_command_line(
        AblationConfig,
        DESCRIPTION,
        plan={"action": "store_true", "help": "print what arms have and what all runs take, then end"},
        only={"metavar": "ARM,...", "help": "run these arms now; default: all"},
        tasks={"metavar": "TASK,...", "help": "run these now: text, or a probe by its name; default: all"},
        minutes={"type": float, "metavar": "M", "help": "begin no run that would not fit; save what runs at the end"},
        gpus={"metavar": "N,...", "help": "GPUs, a run at once on each naming of one; default: all that are visible"},
    )
    from lfm.experiments.ablation import first_runs
    from lfm.experiments.harness import prepared, run_set, visible_gpus
    from lfm.experiments.matching import plan_text, sizes_of

    only, tasks = ([name.strip() for name in flag.split(",")] if flag else () for flag in (flags.only, flags.tasks))
    runs = first_runs(ablation)
    print(plan_text(ablation, runs, sizes_of(runs)), flush=True)
    if flags.minutes is not None and not flags.minutes > 0:
        raise UserError(f"--minutes {flags.minutes:g} leaves no time; give more than 0")
    harness = prepared(ablation, only=only, tasks=tasks)
    if flags.plan:
        return
    gpus = visible_gpus(flags.gpus, next(iter(runs.values())).run.device)
    if not run_set(harness, gpus, minutes=flags.minutes):
        sys.exit(1)
