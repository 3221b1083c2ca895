"""How the processes of a job find each other, and how one that ends before that tells the others.

All meet in the job's store, which rank 0 hosts at MASTER_ADDR:MASTER_PORT, or torchrun's agent does.  Nothing here
waits inside torch for others, so that a signal is answered at once and a lost process is noticed.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lfm.errors import UserError
from lfm.exits import explained
from lfm.job.process import Process
from lfm.talk import say, warn

POLL_SECONDS = 0.2
SILENT_SECONDS = 15.0
"""A process that came and then gave no sign of life for so long, where it gives five a second, is lost."""
SPEAK_SECONDS = 5.0
"""So long a rank looks for the others, who may have the same to say, before it says it alone."""
TELL_SECONDS = 15.0
"""So long a process that ends before the others have come stays to tell them."""
_STOPPING_SECONDS = 2.0
_CALL_SECONDS = 10.0
_SAY_SECONDS = 30.0


class Stopped(Exception):
    """A signal, which `str` names, came to a process of the job before all had met."""


class _Ended(SystemExit):
    """Another process ended the job, and has said why."""


class _Alone(UserError):
    """Said by this process, as there is nobody left to tell."""


class _Waiting:
    """For the others: what one process knows of it."""

    def __init__(self, process: Process, limit_seconds: float, why_stop: Callable[[], str | None]) -> None:
        self.process, self.limit, self.why_stop = process, limit_seconds, why_stop
        self._start, self._said = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def a_moment(self, missing: str) -> None:
        if self.process.rank <= 1 and self.seconds - self._said > _SAY_SECONDS:
            self._said = self.seconds
            place = f"rank {self.process.rank} at {_at(self.process)}"
            say(f"{place} waits for {missing}: {self.seconds:.0f} of {self.limit:.0f} s")
        time.sleep(POLL_SECONDS)


def meet(process: Process, *, limit_seconds: float, why_stop: Callable[[], str | None] = lambda: None) -> Store:
    """The store of a job of several processes, once all have come to it.

    Raises Stopped on all of them when `why_stop` names a signal on one, SystemExit when one of them ended and has said
    why, and UserError, naming who is missing, after `limit_seconds`, when a process is lost, or when the address
    cannot be used.
    """
    waiting = _Waiting(process, limit_seconds, why_stop)
    who, store = f"rank {process.rank} of {process.world_size}", None
    while store is None:
        store, why_not = _open(process)
        if store is None and (cause := why_stop()) is not None:
            raise Stopped(cause)
        if store is None and _of_torchrun() and waiting.seconds > SILENT_SECONDS:
            raise _Alone(
                f"{who} has lost torchrun, which hosts the job's store at {_at(process)} ({why_not}): it ended, or was "
                "killed, while this rank started; start the job again"
            )
        if store is None and waiting.seconds > limit_seconds:
            raise _Alone(
                f"{who} found nobody at {_at(process)} for {waiting.seconds:.0f} s ({why_not}); see what rank 0 says, "
                "set MASTER_ADDR and MASTER_PORT to its host and a free port, or raise "
                "parallel.rendezvous_timeout_seconds"
            )
        if store is None:
            waiting.a_moment("rank 0")
    try:
        _wait_for_all(_room(store), waiting)
        store.set_timeout(timedelta(seconds=max(limit_seconds, _CALL_SECONDS)))
    except RuntimeError as error:  # torch's store and network errors
        raise _Alone(
            f"{who} lost the job's store at {_at(process)} while the ranks met ({_first_line(error)}); "
            "see what rank 0 says"
        ) from None
    return store


def _wait_for_all(room: Store, waiting: _Waiting) -> None:
    process, number = waiting.process, 0
    is_first = process.rank == 0
    keys = ["end", "all", *(f"here/{rank}" for rank in range(process.world_size) if is_first)]
    for key in keys:
        room.compare_set(key, "", "")  # from here on it exists, and reading it does not wait for its writer
    seen: dict[int, tuple[bytes, float]] = {}
    while True:
        number += 1
        room.set(f"here/{process.rank}", f"{number} (pid {os.getpid()}, host {socket.gethostname()})")
        ended, all_here, *signs = room.multi_get(keys)
        now = waiting.seconds
        if ended:
            end = json.loads(ended)
            if "stop" in end:
                _leave(room, process, _STOPPING_SECONDS)
                raise Stopped(end["stop"])
            _leave(room, process, TELL_SECONDS)
            raise _Ended(end["code"])
        if all_here:
            return
        if (cause := waiting.why_stop()) is not None:
            room.compare_set("end", "", json.dumps({"stop": cause}))
            _leave(room, process, _STOPPING_SECONDS)
            raise Stopped(cause)
        for rank, sign in enumerate(signs):
            if sign and seen.get(rank, (b"", 0.0))[0] != sign:
                seen[rank] = sign, now
        if len(seen) == process.world_size:
            room.set("all", "yes")
            return
        for rank, (sign, at) in seen.items():
            if now - at > SILENT_SECONDS:
                _give_up(
                    room,
                    process,
                    f"rank {rank} {sign.decode().partition(' ')[2]} died, was killed or is stopped while the ranks "
                    f"met: no sign of life for {now - at:.0f} s; start the job again",
                )
        missing = _ranks([rank for rank in range(process.world_size) if rank not in seen] if is_first else [0])
        # Rank 0 knows more, and speaks first.
        if now > waiting.limit + (0 if is_first else SILENT_SECONDS):
            _give_up(
                room,
                process,
                f"{missing} of {process.world_size} did not come to {_at(process)} in {waiting.limit:.0f} s; see what "
                "is said there, check that MASTER_ADDR and MASTER_PORT are the same for all, or raise "
                "parallel.rendezvous_timeout_seconds",
            )
        waiting.a_moment(missing)


def _give_up(room: Store, process: Process, sentence: str) -> NoReturn:
    """End the job that does not come together; of several processes that find it so one says why."""
    end = json.dumps({"code": 2, "rank": process.rank})
    is_first = room.compare_set("end", "", end).decode() == end
    _leave(room, process, _STOPPING_SECONDS)
    raise _Alone(sentence) if is_first else _Ended(2)


@contextmanager
def one_voice() -> Iterator[None]:
    """For what a process of a job does until all have met: when it fails, the others end too, at once, with its code.

    A sentence that several have to say is said by one of them.  A process that finds none of the others says it alone.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (_Ended, _Alone)) or (isinstance(error, SystemExit) and not error.code):
            raise
        try:
            process = Process.from_environment()
        except UserError:
            raise error from None
        if process.world_size == 1:
            raise
        told = explained(error)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        words, code = told or (None, code)
        if words is not None and process.rank > 0:
            words = words.replace("error: ", f"error: rank {process.rank}: ", 1)
        _tell(process, words, code, about=told[0] if told else "")
        if told is None:
            raise
        sys.exit(code)


def _tell(process: Process, words: str | None, code: int, *, about: str) -> None:
    """Say `words` unless another process has said the same, which is `about`, and end those that come."""
    start = time.monotonic()
    store = None
    with suppress(UserError):
        while (store := _open(process)[0]) is None and time.monotonic() - start < TELL_SECONDS:
            if words is not None and time.monotonic() - start > SPEAK_SECONDS:
                warn(words)
                words = None
            time.sleep(POLL_SECONDS)
    if store is not None:
        with suppress(RuntimeError):  # who hosts the store has left
            room, key = _room(store), f"said/{hashlib.sha256(about.encode()).hexdigest()}"
            if words is not None and room.compare_set(key, "", str(process.rank)).decode() != str(process.rank):
                words = None
            if words is not None:
                warn(words)
                words = None
            room.compare_set("end", "", json.dumps({"code": code}))
            _leave(room, process, TELL_SECONDS)
    if words is not None:
        warn(words)


def _leave(room: Store, process: Process, seconds: float) -> None:
    """After the job's end was written.  The host of the store stays until all have read of it, or for `seconds`."""
    left, deadline = room.add("left", 1), time.monotonic() + seconds
    while _hosts(process) and left < process.world_size and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        left = room.add("left", 0)


def _open(process: Process) -> tuple[TCPStore | None, str]:
    """The job's store, or why nobody answers there yet.  Raises UserError for an address that cannot be used."""
    place, hosts = (process.address, process.port), _hosts(process)
    try:
        if (why_not := _why_unreachable(place, connect=not hosts)) is not None:
            return None, why_not
        seconds = timedelta(seconds=_CALL_SECONDS)
        store = TCPStore(*place, is_master=hosts, multi_tenant=hosts, wait_for_workers=False, timeout=seconds)
        return store, ""
    except (socket.gaierror, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"MASTER_ADDR={process.address} with MASTER_PORT={process.port} is no address ({reason}); "
            "set them to rank 0's host and a free port"
        ) from None
    except DistError as error:
        if not hosts:
            return None, _first_line(error)
        raise UserError(
            f"rank 0 of {process.world_size} cannot meet the others at {_at(process)} ({_first_line(error)}); "
            "set MASTER_ADDR and MASTER_PORT to rank 0's host and a free port"
        ) from None


def _why_unreachable(place: tuple[str, int], *, connect: bool) -> str | None:
    """Why no connection can be made, if none can; in a thread, as a name server may take its time."""
    found: list[BaseException | None] = []

    def look() -> None:
        try:
            socket.getaddrinfo(*place)
            if connect:
                socket.create_connection(place, timeout=1).close()
            found.append(None)
        except (OSError, OverflowError) as error:
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_CALL_SECONDS)
    error = found[0] if found else TimeoutError("no answer from the name server")
    if isinstance(error, (socket.gaierror, OverflowError)):
        raise error
    return None if error is None else str(error)


def _room(store: Store) -> Store:
    # A restarted job may find the store of its predecessor: no key of that one may count.
    restarts = [os.environ.get(f"{launcher}_RESTART_COUNT", "0") for launcher in ("TORCHELASTIC", "SLURM")]
    return PrefixStore("/".join(["rendezvous", *restarts]), store)


def _hosts(process: Process) -> bool:
    return process.rank == 0 and not _of_torchrun()


def _of_torchrun() -> bool:
    """Whether torchrun hosts the job's store, as it does before it starts any rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _at(process: Process) -> str:
    return f"{process.address}:{process.port}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")[:300]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
