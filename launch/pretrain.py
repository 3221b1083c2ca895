"""Pretrain: `python launch/pretrain.py --config configs/lfm_debug.yaml [key.path=value ...]`.

Also under `torchrun --nproc-per-node 1` and `deepspeed --num_gpus 1`.  `--dry-run` says what the run would take, with
`--world-size N` on N processes.
"""

import os

from lfm.config import parse_command_line
from lfm.errors import UserError, command
from lfm.parallel.layout import check_layout
from lfm.training.run import RunConfig


@command
def main() -> None:
    run, flags = parse_command_line(
        RunConfig,
        "Pretrain a model.",
        dry_run={"action": "store_true", "help": "print counts, FLOPs, memory and the resolved config, then end"},
        folder={"action": "store_true", "help": "check configuration and layout, print the run folder, then end"},
        world_size={"type": int, "metavar": "N", "help": "with --dry-run or --folder: for N processes"},
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
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
    )
    if flags.folder:
        print(run.folder)
        return
    if flags.dry_run:
        from lfm.training.plan import plan

        print(plan(run, layout), "\nresolved config:\n" + run.to_yaml(), sep="\n")
        return
    if world_size > 1 or run.parallel.zero_stage > 0:
        raise UserError(
            f"world size {world_size} with parallel.zero_stage={run.parallel.zero_stage} needs the parallel engine, "
            "which this version does not have; start one process with zero_stage=0"
        )
    from lfm.training.loop import train

    train(run)


if __name__ == "__main__":
    main()
