"""Watching a job of many processes: when one rank fails, dies or hangs, all end and one summary names the first cause.

Every rank has two threads beside its main one.  The exchange, in `exchange.py`, talks to the job's store.  The guard
touches no store, so a store that stops answering cannot stop it: it then moves the exchange to a second store, which
the last rank hosts, and ends a process whose end takes too long.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lfm.job import failure_report
from lfm.job.exchange import BEAT_SECONDS, START_SECONDS, Exchange, Phase
from lfm.job.failure_report import MainThread, Raised

# From the moment a rank knows of a failure to its exit, whatever store, disk or terminal do.
ENDING_SECONDS = 12.0


@contextlib.contextmanager
def watched(
    *,
    rank: int,
    world_size: int,
    address: tuple[str, int],
    heartbeat_timeout_seconds: float,
    hang_timeout_seconds: float,
    report: Path | None,
) -> Iterator["Watch"]:
    """Watch this rank and its peers; enter on every rank when all have met, as often on each.

    `address` is the job's store (MASTER_ADDR, MASTER_PORT), whoever hosts it.  With more than one rank no exception
    leaves: all processes exit with the code of the first cause (that of `explained`, or 1), and one rank prints the
    summary and writes it to `report`, if its folder exists.  A rank is taken for dead after `heartbeat_timeout_seconds`
    without a sign of life (a minute before its first); the job is taken to hang when no rank has begun a phase for
    `hang_timeout_seconds` (a minute before its first).  Rank 0, which may host the store, leaves when all have left.
    """
    exchange = Exchange(
        rank=rank,
        world_size=world_size,
        address=address,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        hang_timeout_seconds=hang_timeout_seconds,
        report=report,
        main_thread=MainThread(own_files=(__file__, contextlib.__file__)),
    )
    watch = Watch(exchange, hang_timeout_seconds)
    if world_size == 1:
        yield watch
        return
    watch._start()
    try:
        yield watch
        watch._leave()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            watch._leave(by=error)
            raise
        watch._end_by(error)


class Watch:
    """What the training loop tells about itself; made by `watched`."""

    def __init__(self, exchange: Exchange, hang_timeout_seconds: float) -> None:
        self._exchange, self._hang_timeout = exchange, hang_timeout_seconds

    def phase(self, name: str, *, allow_seconds: float | None = None) -> None:
        """Say what begins now: this is progress.  `allow_seconds` raises the hang timeout for this phase.

        Every rank must begin as many phases: others wait for the rank that has begun the fewest, as long as its phase
        allows, and it is the one named when the job hangs.
        """
        limit, exchange = max(self._hang_timeout, allow_seconds or 0), self._exchange
        exchange.phase = Phase(name[:200], exchange.phase.progress + 1, exchange.clock(), limit)

    def _start(self) -> None:
        self._exchange.go_on(self._exchange.address, store_rank=0)
        threading.Thread(target=self._guard, name="watch guard", daemon=True).start()
        # Not for long, as all enter together; from here on the first store may be lost, and a rank be missed.
        self._exchange.started.wait(START_SECONDS)

    def _end_by(self, error: BaseException) -> NoReturn:
        """Hand `error` to the exchange, which ends this process; the main thread has nothing more to do."""
        exchange = self._exchange
        exchange.raised = Raised(error, exchange.clock(), failure_report.is_secondary(error))
        exchange.wake.set()
        with contextlib.suppress(KeyboardInterrupt):
            exchange.over.wait()
        os._exit(failure_report.exit_code(error))

    def _leave(self, by: SystemExit | None = None) -> None:
        exchange = self._exchange
        if by is not None:
            exchange.early = failure_report.early_end(by, exchange.beat())
        exchange.left = True
        exchange.wake.set()
        exchange.over.wait()

    def _guard(self) -> None:
        exchange = self._exchange
        timeout, last_rank = exchange.heartbeat_timeout, exchange.world_size - 1
        while not exchange.over.wait(BEAT_SECONDS / 4):
            now = exchange.clock()
            patience = timeout if exchange.started.is_set() else max(timeout, START_SECONDS)
            if exchange.ending_since is not None:
                if now - exchange.ending_since > ENDING_SECONDS:
                    os._exit(exchange.exit_code)
            elif not exchange.is_alive() or now - exchange.answered > patience:
                if exchange.over.is_set():
                    return  # the exchange is at its end because this rank is
                if exchange.store_rank != 0 or exchange.second_address is None:
                    exchange.end_alone()
                exchange.go_on(exchange.second_address, store_rank=last_rank)
