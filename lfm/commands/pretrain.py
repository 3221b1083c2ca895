"""Pretrain: `python launch/pretrain.py --config configs/lfm_debug.yaml [key.path=value ...]`.

On several processes with the same words after `deepspeed`, `torchrun --nproc-per-node N` or `srun python`.  `--dry-run`
says what the run would take, with `--world-size N` on N processes.
"""

from lfm.config import parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.job.process import Process
from lfm.job.rendezvous import one_voice
from lfm.layout.layout import check_layout
from lfm.training.run import RunConfig


@command
@one_voice()
def main() -> None:
    run, flags = parse_command_line(
        RunConfig,
        "Pretrain a model.",
        dry_run={"action": "store_true", "help": "print counts, FLOPs, memory and the resolved config, then end"},
        folder={"action": "store_true", "help": "check configuration and layout, print the run folder, then end"},
        world_size={"type": int, "metavar": "N", "help": "with --dry-run or --folder: for N processes"},
    )
    process = Process.from_environment()
    world_size = process.world_size
    if flags.world_size is not None:
        if not (flags.dry_run or flags.folder) or flags.world_size < 1:
            raise UserError(f"--world-size {flags.world_size} plans for 1 or more processes; give it with --dry-run")
        world_size = flags.world_size
    layout = check_layout(
        run.model,
        run.parallel,
        world_size,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        half=run.dtype.itemsize == 2,
    )
    if flags.folder:
        print(run.folder)
        return
    if flags.dry_run:
        from lfm.training.plan import plan

        print(plan(run, layout), "\nresolved config:\n" + run.to_yaml(), sep="\n")
        return
    from lfm.training.loop import train

    train(run, process, layout)
