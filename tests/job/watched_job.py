"""A worker for a launcher that also hosts the store: `torchrun ... watched_job.py FOLDER (fail | orphan)`."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lfm.job.launchers import Launchers
from lfm.job.watch import watched


def main(folder: Path, end: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    launchers = Launchers()
    with watched(
        rank=rank,
        world_size=dist.get_world_size(),
        address=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
        heartbeat_timeout_seconds=3,
        hang_timeout_seconds=30,
        report=folder / "failure.txt",
    ) as watch:
        gone = None
        for step in range(2000):
            watch.phase(f"step {step}: forward")
            if end == "fail" and rank == 1 and step == 3:
                raise KeyError("no such expert")
            told = torch.tensor([float((gone := launchers.gone()) is not None)])
            dist.all_reduce(told)
            if told.item() > 0:
                watch.phase("saving")
                time.sleep(4)  # longer than a heartbeat's timeout: the launcher's store is not missed
                break
            if step == 3:
                (folder / f"started.{rank}").write_text(str(os.getpid()))
            time.sleep(0.05)
    (folder / f"ended.{rank}").write_text(str(gone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
