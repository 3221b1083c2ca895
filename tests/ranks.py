"""Run a function on several ranks: processes of one gloo group, forked from a server that has imported torch."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120, lost: tuple[int, ...] = ()
) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank; None of a rank in `lost`, which must die before it does.

    The first error of any rank is raised, and the other ranks are ended.
    """
    # Not forks of pytest itself, which has threads whose locks they would inherit.
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch.distributed.checkpoint"])
    deadline = time.monotonic() + timeout
    results: list[Any] = [None] * world_size
    processes, running = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                reader, writer = fork.Pipe(duplex=False)
                store = Path(folder) / "rendezvous"
                process = fork.Process(
                    target=_rank, args=(function, rank, world_size, store, timeout, arguments, writer)
                )
                process.start()
                writer.close()
                processes.append(process)
                running[reader] = rank
            while running:
                ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(running.values())} are not done after {timeout} s"
                for reader in ready:
                    rank = running.pop(reader)
                    try:
                        error, results[rank] = reader.recv()
                    except EOFError:
                        assert rank in lost, f"rank {rank} died"
                        continue
                    assert error is None, f"rank {rank}: {error}"
                    assert rank not in lost, f"rank {rank} lived on"
        finally:
            for process in processes:
                process.kill()
                process.join()
    return results


def _rank(function, rank, world_size, store, timeout, arguments, writer) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    error, result = None, None
    try:
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        result = function(rank, *arguments)
    except BaseException:
        error = traceback.format_exc()
    writer.send((error, result))
    os._exit(0)  # without the parent's exit handlers
