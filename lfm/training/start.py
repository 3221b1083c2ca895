"""How a process comes to train: its device, the other processes, its engine; and how it is asked to stop."""

import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lfm.errors import UserError
from lfm.job import health
from lfm.job.launchers import Launchers
from lfm.job.process import Process, prepare_environment, require_packages
from lfm.job.ranks import Ranks
from lfm.job.rendezvous import meet
from lfm.job.watch import Watch, watched
from lfm.layout.layout import Layout
from lfm.talk import say
from lfm.training.engine import Engine
from lfm.training.local_engine import LocalEngine
from lfm.training.run import RunConfig, owning_folder

SAVING_SECONDS = 7200.0
"""A save, or the first load of a large checkpoint, may take this long before it counts as a hang."""
_ONE_PRESS_SECONDS = 1.0
"""Of one Ctrl-C a process may get several signals, from the terminal and from its launcher."""


@dataclass(frozen=True)
class Started:
    """A process of a run that has met the others."""

    ranks: Ranks
    watch: Watch
    why_stop: Callable[[], str | None]
    """What asks this process to save and end, in words; None: nothing does."""
    make_engine: Callable[[], Engine]
    saver_group: dist.ProcessGroup | None = None
    """Of all processes, for saving alone; None: there is one process."""


@contextmanager
def started(
    run: RunConfig, process: Process, layout: Layout | None, why_stop: Callable[[], str | None]
) -> Iterator[Started]:
    """Meet the other processes of the layout, and hold the run folder; without a layout, this process is alone.

    Raises `Stopped` when this process is asked to stop before all have met.  Where there are several, no exception
    leaves after that: see `watched`.
    """
    device = _device(run, process)
    if layout is None or layout.zero_stage == 0:
        with owning_folder(run), _watching(run, process) as watch:
            yield Started(Ranks(), watch, why_stop, partial(local_engine, run, device))
        return

    require_packages()
    prepare_environment(device.type, tensor=layout.tensor)
    from lfm.parallel import groups as process_groups

    seconds = max(SAVING_SECONDS, 2 * run.parallel.hang_timeout_seconds)  # the watch speaks first
    store = None
    if process.world_size > 1:
        store = meet(process, limit_seconds=run.parallel.rendezvous_timeout_seconds, why_stop=why_stop)
    with _watching(run, process) as watch:
        watch.phase("connecting")
        process_groups.join(process, device, timeout_seconds=seconds, store=store)
        watch.phase("health check")
        health.check(process, device, fingerprint=hashlib.sha256(run.to_yaml().encode()).hexdigest()[:12])
        ranks = Ranks(process.rank, process.world_size, process_groups.gloo_group(seconds))
        # Automatic stages depend on the card; of several kinds, rank 0's.
        agreed = ranks.from_main(lambda: layout)
        if ranks.is_main:
            say(f"layout: {agreed.describe()}")
        with owning_folder(run) if ranks.is_main else nullcontext():
            saver_group = process_groups.gloo_group(seconds)
            engine = partial(_parallel_engine, run, agreed, device, watch)
            yield Started(ranks, watch, why_stop, engine, saver_group)
            watch.phase("leaving")
            dist.barrier(group=ranks.group)
        process_groups.leave()


def _device(run: RunConfig, process: Process) -> torch.device:
    if run.device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("training.device=mps needs an Apple GPU, and none is visible; use training.device=cpu or auto")
    if run.device.type != "cuda":
        if run.training.cuda_graph == "required":
            raise UserError(
                f"training.cuda_graph=required needs a CUDA GPU, and this run trains on {run.device.type}; "
                "set it to auto"
            )
        return run.device
    if process.local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise UserError(
            f"training.device=cuda: rank {process.rank} needs GPU {process.local_rank} and {visible or 'no GPU'} is "
            "visible; start fewer processes a node, or use training.device=cpu or auto"
        )
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    return device


def _watching(run: RunConfig, process: Process) -> AbstractContextManager[Watch]:
    return watched(
        rank=process.rank,
        world_size=process.world_size,
        address=(process.address, process.port),
        heartbeat_timeout_seconds=run.parallel.heartbeat_timeout_seconds,
        hang_timeout_seconds=run.parallel.hang_timeout_seconds,
        report=run.folder / "failure.txt",
    )


def local_engine(run: RunConfig, device: torch.device) -> Engine:
    """The engine of a run in this process alone, its model as the seed makes it."""
    return LocalEngine(
        run.model,
        run.optimizer,
        seed=run.seed,
        device=device,
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
        objective=run.objective,
        initial_loss_scale=run.training.initial_loss_scale,
        cuda_graph=run.training.cuda_graph,
    )


def _parallel_engine(run: RunConfig, layout: Layout, device: torch.device, watch: Watch) -> Engine:
    from lfm.parallel.groups import make_groups
    from lfm.training.parallel_engine import ParallelEngine

    groups = make_groups(layout, device)
    return ParallelEngine(
        run.model,
        run.optimizer,
        groups,
        seed=run.seed,
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
        objective=run.objective,
        phase=watch.phase,
    )


@contextmanager
def wishes_to_stop(deadline: float | None = None) -> Iterator[Callable[[], str | None]]:
    """What asks this process to stop, in words, if anything does: a signal, the end of its launcher, or a time by
    `time.monotonic`.

    A later Ctrl-C interrupts what is done then.
    """
    launchers = Launchers()
    with _stop_signals() as signalled:

        def why_stop() -> str | None:
            gone = launchers.gone()
            over = "the end of its time" if deadline is not None and time.monotonic() > deadline else None
            return signalled() or (f"the end of its launcher, {gone}," if gone else over)

        yield why_stop


@contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """The name of the stop signal that came first, if any did."""
    received: list[tuple[str, float]] = []

    def handle(number: int, frame: Any) -> None:
        # Only a note: a print here could wait for ever, or meet the print that it interrupts.
        now = time.monotonic()
        if received and number == signal.SIGINT and now - received[0][1] > _ONE_PRESS_SECONDS:
            raise KeyboardInterrupt
        received.append((signal.Signals(number).name, now))

    handled = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
    # What was ignored when this program started stays so: `nohup` and shells' background jobs mean it.  SIGUSR1 has no
    # other meaning than ours, and job scripts ignore it until it can be answered.
    handled = [n for n in handled if n == signal.SIGUSR1 or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda: received[0][0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
