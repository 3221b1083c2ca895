"""Pretrain: `python launch/pretrain.py --config configs/lfm_debug.yaml [key.path=value ...]`.

On several processes with the same words after `deepspeed`, `torchrun --nproc-per-node N` or `srun python`.  `--dry-run`
says what the run would take, with `--world-size N` on N processes.  `--data DIR --family KIND --minutes M` in place of
`--config` chooses a preset for a data set, this device and the time.
"""

import argparse
import time

from lfm.commands.own_data import DEFAULT_FAMILY, DEFAULT_MINUTES, PRESETS, Wish, keep_choice, last_words, own_run
from lfm.config import parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists
from lfm.job.process import Process, prepare_environment
from lfm.job.rendezvous import one_voice
from lfm.layout.layout import check_layout
from lfm.talk import say
from lfm.training.run import RunConfig

_PATIENCE = 1.5
"""Times the minutes that were asked for: a run that takes longer stops, saved, and can go on."""

DESCRIPTION = (
    """Pretrain a model: that of --config FILE, or one chosen for --data DIR, this device and so many --minutes."""
)


@command
@one_voice()
def main() -> None:
    begun, said = time.monotonic(), list[str]()
    wish: Wish | None = None

    def chosen(flags: argparse.Namespace) -> RunConfig:
        nonlocal wish
        wish = wish_of(flags)
        run, lines = own_run(wish, started=begun, measure=not flags.folder)
        said.extend(lines)
        return run

    run, flags = parse_command_line(
        RunConfig,
        DESCRIPTION,
        without_config=chosen,
        data={"metavar": "DIR", "help": "in place of --config: a data set folder, for which a preset is chosen"},
        family={"metavar": "KIND", "help": f"with --data: {', '.join(PRESETS)} (default {DEFAULT_FAMILY})"},
        minutes={"type": float, "metavar": "M", "help": f"with --data: about how long (default {DEFAULT_MINUTES:g})"},
        dry_run={"action": "store_true", "help": "print counts, FLOPs, memory and the resolved config, then end"},
        folder={"action": "store_true", "help": "check configuration and layout, print the run folder, then end"},
        world_size={"type": int, "metavar": "N", "help": "with --dry-run or --folder: for N processes"},
    )
    if flags.config is not None and {flags.data, flags.family, flags.minutes} != {None}:
        raise UserError("--data, --family and --minutes are for a run without --config; beside it write data.path=DIR")
    process = Process.from_environment()
    world_size = process.world_size
    if flags.world_size is not None:
        if not (flags.dry_run or flags.folder) or flags.world_size < 1:
            raise UserError(f"--world-size {flags.world_size} plans for 1 or more processes; give it with --dry-run")
        world_size = flags.world_size
    if run.parallel.tensor > 1:  # before the card's name is asked for, which starts CUDA
        prepare_environment(run.device.type, tensor=run.parallel.tensor)
    layout = check_layout(
        run.model,
        run.parallel,
        world_size,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        half=run.dtype.itemsize == 2,
        card=run.card,
    )
    if flags.folder:
        print(run.folder)
        return
    for line in said:
        say(line)
    if flags.dry_run:
        from lfm.training.plan import plan

        print(plan(run, layout), "\nresolved config:\n" + run.to_yaml(), sep="\n")
        return
    from lfm.training.loop import STOPPED, train

    if wish is not None:
        keep_choice(run, wish)
    # A machine that has become much slower than it was measured must not keep anybody for hours.
    deadline = begun + _PATIENCE * 60 * wish.minutes if wish is not None else None
    progress = train(run, process, layout, deadline=deadline)
    if deadline is not None and (time.monotonic() > deadline or not exists(run.folder / STOPPED)):
        say(f"{progress.step:,} steps in {(time.monotonic() - begun) / 60:.1f} minutes, from the command to here")
        for line in last_words(run):
            say(line)


def wish_of(flags: argparse.Namespace) -> Wish:
    """What is asked for in place of a config.  Raises UserError."""
    if flags.data is None:
        raise UserError("there is nothing to train; give --config FILE, or a data set by --data DIR")
    processes = Process.from_environment().world_size
    if processes > 1:
        raise UserError(f"--data chooses for one process and there are {processes}; give them a --config")
    minutes = DEFAULT_MINUTES if flags.minutes is None else flags.minutes
    return Wish(flags.data, flags.family or DEFAULT_FAMILY, minutes, tuple(flags.overrides))
