"""Run one function as several processes of this machine: certificates and tests."""

import multiprocessing
import os
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from lfm.job.process import Process


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300) -> list[Any]:
    """`function(process, *args)` in `world_size` new processes; their results, without tensors, by rank.

    Raises RuntimeError with the first failing rank's traceback, after ending all.  Processes are forked from a server
    that has paid the slow imports and nothing else: forks of this process could inherit CUDA, or locks of its threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lfm.parallel.megatron", "lfm.parallel.stage", "lfm.parallel.zero"])
    results = context.Queue()
    port = _free_port()
    ranks = [Process(r, world_size, r, world_size, "127.0.0.1", port) for r in range(world_size)]
    workers = [context.Process(target=_run, args=(function, process, args, results)) for process in ranks]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + timeout_seconds
    try:
        while len(found) < world_size:
            try:
                rank, error, value = results.get(timeout=0.2)
            except queue.Empty:
                dead = [r for r, worker in enumerate(workers) if worker.exitcode not in (None, 0) and r not in found]
                if dead:
                    raise RuntimeError(f"rank {dead[0]} ended with exit code {workers[dead[0]].exitcode}") from None
                if time.monotonic() > end:
                    missing = sorted(set(range(world_size)) - set(found))
                    raise RuntimeError(f"no result from ranks {missing} in {timeout_seconds:.0f} s") from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            found[rank] = value
    finally:
        for worker in workers:
            worker.join(0 if len(found) < world_size else 10)
            if worker.is_alive():
                worker.kill()
    return [found[rank] for rank in range(world_size)]


def _free_port() -> int:
    """Below those that systems hand out: one of them could be a neighbour's, of NCCL, before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _run(function: Callable[..., Any], process: Process, args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    try:
        results.put((process.rank, None, function(process, *args)))
    except BaseException:
        results.put((process.rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    # Without the interpreter's long good-bye to gloo's threads and the libraries' exit hooks.
    os._exit(0)
