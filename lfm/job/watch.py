"""Watching a job of many processes: when one rank fails, dies or hangs, all end and one summary names the first cause.

Every rank has two threads beside its main one.  `exchange` talks to the job's store: about once a second it writes this
rank's beat and reads rank 0's (rank 0 reads all), and whoever finds something wrong writes it under `failed`, where the
first writer wins.  `guard` touches no store, so a store that stops answering cannot stop it: it then moves the exchange
to a second store, which the last rank hosts, and ends a process whose end takes too long.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lfm.errors import NonFiniteError
from lfm.exits import explained
from lfm.files import write_durably

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
# From the moment a rank knows of a failure to its exit, whatever store, disk or terminal do.
ENDING_SECONDS = 12.0

_DISTRIBUTED = os.path.dirname(dist.__file__) + os.sep
_PEER_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|ProcessGroup", re.IGNORECASE)
_uses = itertools.count()


class _Phase(NamedTuple):
    name: str
    progress: int
    """Phases begun before this one: how far the rank has come."""
    began: float
    limit: float


class _Raised(NamedTuple):
    error: BaseException
    at: float
    secondary: bool


class _Clock:
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
    `hang_timeout_seconds`.  Rank 0, which may host the store, leaves when all have left.
    """
    watch = Watch(
        rank=rank,
        world_size=world_size,
        address=address,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        hang_timeout_seconds=hang_timeout_seconds,
        report=report,
    )
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

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        address: tuple[str, int],
        heartbeat_timeout_seconds: float,
        hang_timeout_seconds: float,
        report: Path | None,
    ) -> None:
        self._rank, self._world_size, self._report = rank, world_size, report
        self._heartbeat_timeout, self._hang_timeout = heartbeat_timeout_seconds, hang_timeout_seconds
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._clock = _Clock()
        self._phase = _Phase("starting", 0, self._clock(), hang_timeout_seconds)
        self._main_thread = threading.get_ident()
        own_files = (__file__, contextlib.__file__)
        callers = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename not in own_files]
        self._num_outer_frames = len(callers) - 1
        self._raised: _Raised | None = None
        self._left = False
        self._early: dict[str, Any] | None = None
        """What others are to say if this rank, which left by `sys.exit(0)`, left them alone."""
        self._wake, self._over, self._started = threading.Event(), threading.Event(), threading.Event()

        self._address, self._store_rank = address, 0
        self._second_address: tuple[str, int] | None = None
        self._second_store: TCPStore | None = None
        self._connection_error = "no answer"
        self._answered = self._clock()
        # A restarted job may find the store of its predecessor: no key of that one may count.
        restarts = [os.environ.get(f"{launcher}_RESTART_COUNT", "0") for launcher in ("TORCHELASTIC", "SLURM")]
        self._prefix = "/".join(["watch", *restarts, str(next(_uses))])

        self._beats: dict[int, dict[str, Any]] = {}
        self._raw_beats: dict[int, bytes] = {}
        self._beat_at: dict[int, float] = {}
        self._num_beats = 0
        self._ended: set[int] = set()
        self._exit_code = 1
        self._ending_since: float | None = None

    def phase(self, name: str, *, allow_seconds: float | None = None) -> None:
        """Say what begins now: this is progress.  `allow_seconds` raises the hang timeout for this phase.

        Every rank must begin as many phases: others wait for the rank that has begun the fewest, as long as its phase
        allows, and it is the one named when the job hangs.
        """
        limit = max(self._hang_timeout, allow_seconds or 0)
        self._phase = _Phase(name[:200], self._phase.progress + 1, self._clock(), limit)

    def _start(self) -> None:
        self._exchange_on(self._address)
        threading.Thread(target=self._guard, name="watch guard", daemon=True).start()
        # Not for long, as all enter together; from here on the first store may be lost, and a rank be missed.
        self._started.wait(START_SECONDS)

    def _end_by(self, error: BaseException) -> NoReturn:
        """Hand `error` to the exchange, which ends this process; the main thread has nothing more to do."""
        self._raised = _Raised(error, self._clock(), _is_secondary(error))
        self._wake.set()
        with contextlib.suppress(KeyboardInterrupt):
            self._over.wait()
        os._exit(_exit_code(error))

    def _leave(self, by: SystemExit | None = None) -> None:
        if by is not None:
            headline = f"error: {self._name(self._beat())} ended by sys.exit(0) in phase '{self._phase.name}'"
            failure = {"kind": "error", "rank": self._rank, "dead": [], "code": 1, "details": _traceback(by)}
            self._early = failure | {"headline": f"{headline}, and the others went on"}
        self._left = True
        self._wake.set()
        self._over.wait()

    # The guard.

    def _guard(self) -> None:
        while not self._over.wait(BEAT_SECONDS / 4):
            now = self._clock()
            patience = (
                self._heartbeat_timeout if self._started.is_set() else max(self._heartbeat_timeout, START_SECONDS)
            )
            if self._ending_since is not None:
                if now - self._ending_since > ENDING_SECONDS:
                    os._exit(self._exit_code)
            elif not self._exchange_thread.is_alive() or now - self._answered > patience:
                if self._over.is_set():
                    return  # the exchange is at its end because this rank is
                if self._store_rank != 0 or self._second_address is None:
                    self._end_alone()
                self._store_rank = self._world_size - 1
                self._exchange_on(self._second_address)

    def _exchange_on(self, address: tuple[str, int]) -> None:
        now = self._answered = self._clock()
        latest = now - self._heartbeat_timeout + GRACE_SECONDS if self._beat_at else now
        for rank in range(self._world_size):
            self._beat_at[rank] = max(self._beat_at.get(rank, latest), latest)
        self._exchange_thread = threading.Thread(
            target=self._exchange, args=(address,), name="watch exchange", daemon=True
        )
        self._exchange_thread.start()

    def _end_alone(self) -> NoReturn:
        """End without a store to agree over: each rank says for itself what it knows."""
        self._ending_since = self._clock()
        host, port = self._address
        if self._raised is not None and not self._raised.secondary:
            failure = self._failure_of(self._raised)
            self._exit_code = failure["code"]
            self._publish("\n".join([failure["headline"], failure["details"]]).strip())
        else:
            self._publish(
                f"error: {self._name(self._beat())} lost the job's store at {host}:{port} ({self._connection_error}) "
                f"and its second one: the processes that host them, or the network, are gone; "
                f"phase '{self._phase.name}'\n{self._stack()}"
            )
        self._exit()

    # The exchange.

    def _exchange(self, address: tuple[str, int]) -> None:
        try:
            timeout = timedelta(seconds=max(self._heartbeat_timeout, START_SECONDS))
            server = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
            store = PrefixStore(self._prefix, server)
            read = range(self._world_size) if self._rank == 0 else [0]
            keys = ["failed", "second_store", "all_ended", "left_early", *(f"beat/{rank}" for rank in read)]
            for key in [*keys, "secondary", "printer"]:
                store.compare_set(key, "", "")  # from here on it exists, and reading it does not wait for its writer
            if self._rank == self._world_size - 1 and self._store_rank == 0:
                store.set("second_store", json.dumps(self._host_second_store(address)))
            while self._exchange_thread is threading.current_thread():
                left = self._left
                told = self._phase
                store.set(f"beat/{self._rank}", json.dumps(self._beat()))
                failed, second, all_ended, early, *beats = store.multi_get(keys)
                if self._exchange_thread is not threading.current_thread():
                    return  # the guard gave this store up, which then answered after all
                self._answered = self._clock()
                self._note(dict(zip(read, beats, strict=True)))
                if second and all(beats):  # who was never heard is given much longer than who falls silent
                    host, port = json.loads(second)
                    self._second_address = (host, port)
                    self._started.set()
                failure = json.loads(failed) if failed else self._find_failure(store, early)
                if failure is not None:
                    self._end(store, failure)
                if left and self._rank not in self._ended:
                    # The last that a rank says: the store's host may leave, and take it along, when it has read this.
                    self._ended.add(self._rank)
                    if self._early is not None:
                        store.compare_set("left_early", "", json.dumps(self._early))
                    store.set(f"beat/{self._rank}", json.dumps(self._beat()))
                if self._rank == 0 and len(self._ended) == self._world_size:
                    store.set("all_ended", "yes")
                    all_ended = b"yes"
                # Rank 0 watches the others to their end; the host of the store keeps it for them.
                if left and (all_ended or self._rank not in (0, self._store_rank)):
                    self._over.set()
                    return
                for _ in range(BEATS_OF_PHASES):
                    if self._wake.wait((BEAT_SECONDS if self._second_address else BEAT_SECONDS / 20) / BEATS_OF_PHASES):
                        break
                    if self._phase is not told:  # of a rank that dies, its last beat tells where
                        told = self._phase
                        store.set(f"beat/{self._rank}", json.dumps(self._beat()))
                self._wake.clear()
        except (RuntimeError, OSError) as error:  # the first are torch's store and network errors
            self._connection_error = str(error).splitlines()[0][:300]

    def _host_second_store(self, address: tuple[str, int]) -> tuple[str, int]:
        family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: asks for the address under which this host reaches the first store
            host = probe.getsockname()[0]
        self._second_store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._second_store.port

    def _beat(self) -> dict[str, Any]:
        phase = self._phase
        self._num_beats += 1
        return {
            "number": self._num_beats,
            "rank": self._rank,
            "host": self._host,
            "pid": self._pid,
            "phase": phase.name,
            "progress": phase.progress,
            "seconds": self._clock() - phase.began,
            "limit": phase.limit,
            "running": self._raised is None and not self._left,
            "ended": self._rank in self._ended,
        }

    def _note(self, beats: dict[int, bytes]) -> None:
        for rank, raw in beats.items():
            if raw and raw != self._raw_beats.get(rank):
                self._raw_beats[rank], self._beat_at[rank] = raw, self._answered
                self._beats[rank] = json.loads(raw)
                if self._beats[rank]["ended"]:
                    self._ended.add(rank)

    def _find_failure(self, store: Store, early: bytes) -> dict[str, Any] | None:
        failure = self._own_failure(store) or self._death() or self._hang()
        consequence = (self._raised is not None and self._raised.secondary) or (failure or {}).get("kind") == "hang"
        if early and consequence:  # of being left alone
            failure = json.loads(early)
        return None if failure is None else json.loads(store.compare_set("failed", "", json.dumps(failure)))

    def _own_failure(self, store: Store) -> dict[str, Any] | None:
        if self._raised is None:
            return None
        failure = self._failure_of(self._raised)
        if not self._raised.secondary:
            return failure
        earliest = store.compare_set("secondary", "", json.dumps(failure))
        waited = self._clock() - self._raised.at
        return json.loads(earliest) if waited > self._heartbeat_timeout + GRACE_SECONDS else None

    def _death(self) -> dict[str, Any] | None:
        now, timeout = self._clock(), self._heartbeat_timeout
        # Rank 0 goes on after its end, until all have ended.
        silent = {
            rank: now - self._beat_at[rank]
            for rank in (range(1, self._world_size) if self._rank == 0 else [0])
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
        headline = (
            f"error: {self._name(beat)} died, was killed or is stopped: no sign of life for {silent[first]:.0f} s; "
            f"its last phase: {beat['phase']}"
        )
        if len(dead) > 1:
            headline += f"; silent as well: {_ranks([rank for rank in dead if rank != first])}"
        return {"kind": "death", "rank": first, "dead": dead, "code": 1, "headline": headline, "details": ""}

    def _hang(self) -> dict[str, Any] | None:
        """A hang stops all ranks, as they wait for each other: how long they may is up to those that are behind."""
        running = [beat for beat in self._beats.values() if beat["running"]]
        if self._rank != 0 or not running or len(self._beats) < self._world_size:
            return None
        behind = min(beat["progress"] for beat in running)
        limit = max(beat["limit"] for beat in running if beat["progress"] == behind)
        if min(beat["seconds"] for beat in running) <= limit:
            return None
        return {"kind": "hang", "rank": None, "dead": [], "code": 1, "headline": "", "details": ""}

    def _failure_of(self, raised: _Raised) -> dict[str, Any]:
        error, name = raised.error, self._name(self._beat())
        failure = {"kind": "error", "rank": self._rank, "dead": [], "code": _exit_code(error), "details": ""}
        if told := explained(error):
            sentence = told[0].removeprefix("error: ")
            start = "error: " if sentence != told[0] else ""
            return failure | {"kind": "brief", "headline": f"{start}rank {self._rank}: {sentence}"}
        headline = f"error: {name} failed in phase '{self._phase.name}': {_one_line(error)}"
        if raised.secondary:
            headline += "\n(a lost peer is the likely cause, but no rank told of another error, died or hung)"
        return failure | {"headline": headline, "details": _traceback(error)}

    # The end.

    def _end(self, store: Store, failure: dict[str, Any]) -> NoReturn:
        """Report, see that one rank prints the summary, exit."""
        self._exit_code = failure["code"]
        self._ending_since = start = self._clock()
        own = self._beat() | {
            "stack": _traceback(self._raised.error, header=False) if self._raised else self._stack(),
            "raised": _one_line(self._raised.error) if self._raised else None,
            "waits_for_peers": self._waits_for_peers(),
        }
        me = str(self._rank)
        try:
            store.set(f"report/{me}", json.dumps(own))
            store.add("reports", 1)
            gone = {*failure["dead"], *(self._ended - {0})}
            printer = min(rank for rank in range(self._world_size) if rank not in failure["dead"])
            while not store.check(["summary"]):
                waited = self._clock() - start
                if self._rank == printer:
                    complete = failure["kind"] == "brief" or store.add("reports", 0) >= self._world_size - len(gone)
                    my_turn = complete or waited > REPORTS_SECONDS
                else:
                    my_turn = waited > REPORTS_SECONDS + 2
                if my_turn and store.compare_set("printer", "", me).decode() == me:
                    self._publish(self._summary(store, failure), to_file=failure["kind"] != "brief")
                    store.set("summary", "printed")
                time.sleep(0.1)
            # No process may take the store along while others still have to read of the failure.
            left, deadline = store.add("left", 1), self._clock() + LEAVING_SECONDS
            while self._rank == self._store_rank and self._clock() < deadline and left < self._world_size - len(gone):
                time.sleep(0.05)
                left = store.add("left", 0)
        except RuntimeError:  # the store has gone: so have those who knew more, except of this rank's own error
            if failure["rank"] == self._rank:
                self._publish("\n".join([failure["headline"], failure["details"]]).strip())
        self._exit()

    def _summary(self, store: Store, failure: dict[str, Any]) -> str:
        """The first cause, then every rank's last phase and stack, equal ones together."""
        headline, details = failure["headline"], failure["details"]
        if failure["kind"] == "brief":
            return headline
        reports = {
            rank: json.loads(store.get(f"report/{rank}"))
            for rank in range(self._world_size)
            if store.check([f"report/{rank}"])
        }
        cause = failure["rank"] if failure["kind"] == "error" else None
        if failure["kind"] == "hang":
            running = [report for report in reports.values() if report["running"]] or list(reports.values())
            slowest = min(running, key=lambda report: (report["progress"], report["waits_for_peers"], report["rank"]))
            cause, details = slowest["rank"], slowest["stack"]
            headline = f"error: {self._name(slowest)} hangs: {slowest['seconds']:.0f} s in phase '{slowest['phase']}'"
        groups: dict[tuple[str, str], list[int]] = {}
        for rank in range(self._world_size):
            if rank == cause and rank in reports:
                told, stack = f"in phase '{reports[rank]['phase']}'", "  see above"
            elif rank in reports:
                state = "after its end, waiting for the others" if not reports[rank]["running"] else ""
                state = "raised an error as well" if reports[rank]["raised"] else state
                told, stack = f"in phase '{reports[rank]['phase']}'{state and ', ' + state}", reports[rank]["stack"]
            else:
                raw = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
                beat = json.loads(raw or '{"phase": "none", "ended": false}')
                told = "ended without error" if beat["ended"] else f"no report; last phase: '{beat['phase']}'"
                stack = ""
            groups.setdefault((told, stack), []).append(rank)
        lines = [headline, *([details] if details else []), "", "Last phase and main thread of every rank:"]
        for (told, stack), ranks in groups.items():
            lines += [f"{_ranks(ranks)}: {told}", *([stack] if stack else [])]
            errors = [reports[rank]["raised"] for rank in ranks if rank in reports and rank != cause]
            lines += [f"  {error}" for error in errors[:1] if error]
        return "\n".join(lines)

    def _publish(self, text: str, to_file: bool = False) -> None:
        try:
            print(text, file=sys.stderr, flush=True)
            if to_file and self._report is not None and self._report.parent.is_dir():
                write_durably(self._report, (text + "\n").encode(errors="backslashreplace"))
        except OSError:
            pass  # a closed terminal or a full disk: the end goes on

    def _exit(self) -> NoReturn:
        # The main thread may hold a stream's lock for as long as it hangs.
        flushing = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
        flushing.start()
        flushing.join(1)
        os._exit(self._exit_code)

    def _stack(self) -> str:
        """Of the main thread, innermost call last, from the function that entered `watched`."""
        frame = sys._current_frames().get(self._main_thread)
        frames = traceback.extract_stack(frame)[self._num_outer_frames :] if frame is not None else []
        return "".join(traceback.format_list(frames)).rstrip()

    def _waits_for_peers(self) -> bool:
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and frame.f_code.co_filename.startswith(_DISTRIBUTED)

    def _name(self, beat: dict[str, Any]) -> str:
        return f"rank {beat['rank']} (pid {beat.get('pid', 'unknown')}, host {beat.get('host', 'unknown')})"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    told = explained(error)
    return told[1] if told else 1


def _is_secondary(error: BaseException) -> bool:
    """Whether `error` tells of a lost peer: torch.distributed's own types, or a RuntimeError out of a collective."""
    if not isinstance(error, RuntimeError) or isinstance(error, NonFiniteError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and frames[-1].filename.startswith(_DISTRIBUTED)
    return inside or isinstance(error, dist.DistError) or _PEER_LOST.search(str(error)) is not None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def _traceback(error: BaseException, *, header: bool = True) -> str:
    """Without the frame of `watched` itself, which is the outermost."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    lines = traceback.format_exception(type(error), error, frames) if header else traceback.format_tb(frames)
    return "".join(lines).rstrip()[-20_000:]


def _ranks(ranks: list[int]) -> str:
    """[0, 2, 3, 4] is "ranks 0, 2-4"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(spans)
