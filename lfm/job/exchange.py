"""The exchange of a job's ranks over a store: beats, a second store, and the one failure that all end by.

About once a second a rank writes its beat and reads rank 0's (rank 0 reads all).  Whoever finds something wrong writes
it under `failed`, where the first writer wins; everyone who reads it reports, and one prints the summary.
"""

import itertools
import json
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lfm.job import failure_report
from lfm.job.failure_report import MainThread, Raised

BEAT_SECONDS = 1.0
# Within a second a new phase is told so many times at most.
BEATS_OF_PHASES = 5
# For a first sign of life at least: connecting may wait for a slow name server.
START_SECONDS = 60.0
# An error from a collective is a consequence more often than a cause; the cause is found this much after a heartbeat's
# timeout.  Ranks that change to the second store, not all in the same moment, are given as long.
GRACE_SECONDS = 3.0
REPORTS_SECONDS = 3.0
LEAVING_SECONDS = 5.0

_uses = itertools.count()


class Phase(NamedTuple):
    name: str
    progress: int
    """Phases begun before this one: how far the rank has come."""
    began: float
    limit: float


class Clock:
    """Seconds for which this process was running.

    A process that was stopped for a while (SIGSTOP, a suspended job) must not take the gap for its peers' silence.
    The guard reads the clock several times a second, so a gap of more than a second is such a stop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._read_at = 0.0, time.monotonic()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._read_at, 1.0)
            self._read_at = now
            return self._seconds


class Exchange:
    """What this rank says of itself, what it has heard of the others, and the thread that talks to the store.

    The main thread sets `phase`, `raised`, `early` and `left`, then `wake`; it may go when `over` is set.  The guard
    reads `answered` and moves the exchange with `go_on`.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        address: tuple[str, int],
        heartbeat_timeout_seconds: float,
        hang_timeout_seconds: float,
        report: Path | None,
        main_thread: MainThread,
    ) -> None:
        self.rank, self.world_size, self._report, self._main_thread = rank, world_size, report, main_thread
        self.heartbeat_timeout = heartbeat_timeout_seconds
        self._host, self._pid = socket.gethostname(), os.getpid()
        self.clock = Clock()
        self.phase = Phase("starting", 0, self.clock(), max(hang_timeout_seconds, START_SECONDS))
        self.raised: Raised | None = None
        self.left = False
        self.early: dict[str, Any] | None = None
        """What others are to say if this rank, which left by `sys.exit(0)`, left them alone."""
        self.wake, self.over, self.started = threading.Event(), threading.Event(), threading.Event()

        self.address, self.store_rank = address, 0
        self.second_address: tuple[str, int] | None = None
        self._second_store: TCPStore | None = None
        self.connection_error = "no answer"
        self.answered = self.clock()
        # A restarted job may find the store of its predecessor: no key of that one may count.
        restarts = [os.environ.get(f"{launcher}_RESTART_COUNT", "0") for launcher in ("TORCHELASTIC", "SLURM")]
        self._prefix = "/".join(["watch", *restarts, str(next(_uses))])

        self._beats: dict[int, dict[str, Any]] = {}
        self._raw_beats: dict[int, bytes] = {}
        self._beat_at: dict[int, float] = {}
        self._num_beats = 0
        self._ended: set[int] = set()
        self.exit_code = 1
        self.ending_since: float | None = None

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def go_on(self, address: tuple[str, int], store_rank: int) -> None:
        """Talk to the store at `address`, which `store_rank` hosts, in a new thread."""
        self.store_rank = store_rank
        now = self.answered = self.clock()
        latest = now - self.heartbeat_timeout + GRACE_SECONDS if self._beat_at else now
        for rank in range(self.world_size):
            self._beat_at[rank] = max(self._beat_at.get(rank, latest), latest)
        self._thread = threading.Thread(target=self._run, args=(address,), name="watch exchange", daemon=True)
        self._thread.start()

    def beat(self) -> dict[str, Any]:
        phase = self.phase
        self._num_beats += 1
        return {
            "number": self._num_beats,
            "rank": self.rank,
            "host": self._host,
            "pid": self._pid,
            "phase": phase.name,
            "progress": phase.progress,
            "seconds": self.clock() - phase.began,
            "limit": phase.limit,
            "running": self.raised is None and not self.left,
            "ended": self.rank in self._ended,
        }

    def _run(self, address: tuple[str, int]) -> None:
        try:
            timeout = timedelta(seconds=max(self.heartbeat_timeout, START_SECONDS))
            server = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
            store = PrefixStore(self._prefix, server)
            read = range(self.world_size) if self.rank == 0 else [0]
            keys = ["failed", "second_store", "all_ended", "left_early", *(f"beat/{rank}" for rank in read)]
            for key in [*keys, "secondary", "printer"]:
                store.compare_set(key, "", "")  # from here on it exists, and reading it does not wait for its writer
            if self.rank == self.world_size - 1 and self.store_rank == 0:
                store.set("second_store", json.dumps(self._host_second_store(address)))
            while self._thread is threading.current_thread():
                left = self.left
                told = self._tell(store)
                failed, second, all_ended, early, *beats = store.multi_get(keys)
                if self._thread is not threading.current_thread():
                    return  # the guard gave this store up, which then answered after all
                self.answered = self.clock()
                self._note(dict(zip(read, beats, strict=True)))
                if second and all(beats):  # who was never heard is given much longer than who falls silent
                    host, port = json.loads(second)
                    self.second_address = (host, port)
                    self.started.set()
                failure = json.loads(failed) if failed else self._find_failure(store, early)
                if failure is not None:
                    self._end(store, failure)
                if left and self.rank not in self._ended:
                    # The last that a rank says: the store's host may leave, and take it along, when it has read this.
                    self._ended.add(self.rank)
                    if self.early is not None:
                        store.compare_set("left_early", "", json.dumps(self.early))
                    self._tell(store)
                if self.rank == 0 and len(self._ended) == self.world_size:
                    store.set("all_ended", "yes")
                    all_ended = b"yes"
                # Rank 0 watches the others to their end; the host of the store keeps it for them.
                if left and (all_ended or self.rank not in (0, self.store_rank)):
                    self.over.set()
                    return
                self._rest(store, told)
        except (RuntimeError, OSError) as error:  # the first are torch's store and network errors
            self.connection_error = str(error).splitlines()[0][:300]

    def _tell(self, store: Store) -> Phase:
        """Write this rank's beat; the phase that it tells, or an older one."""
        told = self.phase
        store.set(f"beat/{self.rank}", json.dumps(self.beat()))
        return told

    def _rest(self, store: Store, told: Phase) -> None:
        """Until the next beat is due, or `wake` is set; new phases are told at once."""
        for _ in range(BEATS_OF_PHASES):
            if self.wake.wait((BEAT_SECONDS if self.second_address else BEAT_SECONDS / 20) / BEATS_OF_PHASES):
                break
            if self.phase is not told:  # of a rank that dies, its last beat tells where
                told = self._tell(store)
        self.wake.clear()

    def _host_second_store(self, address: tuple[str, int]) -> tuple[str, int]:
        family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: asks for the address under which this host reaches the first store
            host = probe.getsockname()[0]
        self._second_store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._second_store.port

    def _note(self, beats: dict[int, bytes]) -> None:
        for rank, raw in beats.items():
            if raw and raw != self._raw_beats.get(rank):
                self._raw_beats[rank], self._beat_at[rank] = raw, self.answered
                self._beats[rank] = json.loads(raw)
                if self._beats[rank]["ended"]:
                    self._ended.add(rank)

    # What is wrong.

    def _find_failure(self, store: Store, early: bytes) -> dict[str, Any] | None:
        failure = self._own_failure(store) or self._death() or self._hang()
        consequence = (self.raised is not None and self.raised.secondary) or (failure or {}).get("kind") == "hang"
        if early and consequence:  # of being left alone
            failure = json.loads(early)
        return None if failure is None else json.loads(store.compare_set("failed", "", json.dumps(failure)))

    def _own_failure(self, store: Store) -> dict[str, Any] | None:
        if self.raised is None:
            return None
        failure = failure_report.failure_of(self.raised, self.beat())
        if not self.raised.secondary:
            return failure
        earliest = store.compare_set("secondary", "", json.dumps(failure))
        waited = self.clock() - self.raised.at
        return json.loads(earliest) if waited > self.heartbeat_timeout + GRACE_SECONDS else None

    def _death(self) -> dict[str, Any] | None:
        now, timeout = self.clock(), self.heartbeat_timeout
        # Rank 0 goes on after its end, until all have ended.
        silent = {
            rank: now - self._beat_at[rank]
            for rank in (range(1, self.world_size) if self.rank == 0 else [0])
            if rank == 0 or rank not in self._ended
        }
        known, start_timeout = self._beats, max(timeout, START_SECONDS)
        overdue = [rank for rank in silent if silent[rank] > (timeout if rank in known else start_timeout)]
        if not overdue:
            return None
        # A lost node takes many ranks with it, not all heard last in the same moment.
        dead = [rank for rank in silent if rank in overdue or (rank in known and silent[rank] > 0.8 * timeout)]
        first = max(overdue, key=lambda rank: silent[rank])
        beat = self._beats.get(first, {"rank": first, "phase": "none"})
        return failure_report.death(beat, dead, silent[first])

    def _hang(self) -> dict[str, Any] | None:
        """A hang stops all ranks, as they wait for each other: how long they may is up to those that are behind."""
        running = [beat for beat in self._beats.values() if beat["running"]]
        if self.rank != 0 or not running or len(self._beats) < self.world_size:
            return None
        behind = min(beat["progress"] for beat in running)
        limit = max(beat["limit"] for beat in running if beat["progress"] == behind)
        if min(beat["seconds"] for beat in running) <= limit:
            return None
        return failure_report.hang()

    # The end.

    def _end(self, store: Store, failure: dict[str, Any]) -> NoReturn:
        """Report, see that one rank prints the summary, exit."""
        self.exit_code = failure["code"]
        self.ending_since = start = self.clock()
        raised = None if self.raised is None else self.raised.error
        own = self.beat() | {
            "stack": failure_report.traceback_of(raised, header=False)
            if raised is not None
            else self._main_thread.stack(),
            "raised": failure_report.one_line(raised) if raised is not None else None,
            "waits_for_peers": self._main_thread.waits_for_peers(),
        }
        me = str(self.rank)
        try:
            store.set(f"report/{me}", json.dumps(own))
            store.add("reports", 1)
            gone = {*failure["dead"], *(self._ended - {0})}
            printer = min(rank for rank in range(self.world_size) if rank not in failure["dead"])
            while not store.check(["summary"]):
                waited = self.clock() - start
                if self.rank == printer:
                    complete = failure["kind"] == "brief" or store.add("reports", 0) >= self.world_size - len(gone)
                    my_turn = complete or waited > REPORTS_SECONDS
                else:
                    my_turn = waited > REPORTS_SECONDS + 2
                if my_turn and store.compare_set("printer", "", me).decode() == me:
                    file = None if failure["kind"] == "brief" else self._report
                    failure_report.publish(self._summary(store, failure), file)
                    store.set("summary", "printed")
                time.sleep(0.1)
            # No process may take the store along while others still have to read of the failure.
            left, deadline = store.add("left", 1), self.clock() + LEAVING_SECONDS
            while self.rank == self.store_rank and self.clock() < deadline and left < self.world_size - len(gone):
                time.sleep(0.05)
                left = store.add("left", 0)
        except RuntimeError:  # the store has gone: so have those who knew more, except of this rank's own error
            if failure["rank"] == self.rank:
                failure_report.publish(failure_report.told_alone(failure))
        failure_report.leave(self.exit_code)

    def _summary(self, store: Store, failure: dict[str, Any]) -> str:
        if failure["kind"] == "brief":
            return failure["headline"]

        def read(kind: str) -> dict[int, dict[str, Any]]:
            keys = {rank: f"{kind}/{rank}" for rank in range(self.world_size)}
            found = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
            return {rank: json.loads(raw) for rank, raw in found.items() if raw}

        unheard = {rank: {"phase": "none", "ended": False} for rank in range(self.world_size)}
        return failure_report.summary(failure, read("report"), unheard | read("beat"))

    def end_alone(self) -> NoReturn:
        """End without a store to agree over: each rank says for itself what it knows."""
        self.ending_since = self.clock()
        beat = self.beat()
        if self.raised is not None and not self.raised.secondary:
            failure = failure_report.failure_of(self.raised, beat)
            self.exit_code = failure["code"]
            failure_report.publish(failure_report.told_alone(failure))
        else:
            stack = self._main_thread.stack()
            failure_report.publish(failure_report.lost_stores(beat, self.address, self.connection_error, stack))
        failure_report.leave(self.exit_code)
