"""Remote files in a local folder that the processes of a node share: each fetched once, whole or not at all.

Everything that a killed process leaves in the folder is temporary files, which the next one to open it removes.
"""

import errno
import fcntl
import os
import re
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm.data.remote import download
from lfm.errors import UserError
from lfm.files import exists, file_size, reason

LOCK_NAME = ".lock"

_PAUSES = (0.5, 1.0, 2.0)
"""Seconds before another attempt to fetch a file."""
_FINAL = (FileNotFoundError, PermissionError, ValueError, ImportError)
_PASSING = (408, 429)
"""Refusals over HTTP that another attempt may not meet: too slow, too often."""
_ROOM = 2**40
"""The byte of the lock file that stands for all of the folder; shard i has byte i."""
_ABANDONED_SECONDS = 86400.0


class Cache:
    """The folder, which all processes of a node, or of several that share a file system, may use at once."""

    def __init__(self, folder: Path, *, timeout_seconds: float, limit_bytes: int | None) -> None:
        self.folder, self._timeout_seconds, self._limit_bytes = folder, timeout_seconds, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._lock)
        self._making_room = threading.Lock()

    @contextmanager
    def alone(self, number: int) -> Iterator[None]:
        """Keep other processes from fetching shard `number`; the system lets go of it however this process ends.

        Threads of one process do not wait for each other.  Raises UserError when another process holds it for longer
        than a fetch may take.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has been fetching shard {number} into {self.folder} for longer than "
                        f"fetch_timeout_seconds={self._timeout_seconds:g}; end that process or allow more time"
                    ) from None
                time.sleep(0.02)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, number)

    def make_room(self, num_bytes: int, shards: Collection[Collection[Path]]) -> None:
        """Remove the least recently opened `shards` (the files of each) until `num_bytes` more keep the limit.

        A process that reads one of them goes on undisturbed: its open file stays whole.
        """
        if self._limit_bytes is None:
            return
        with self._making_room, self.alone(_ROOM):
            present: list[tuple[int, int, Collection[Path]]] = []
            for files in shards:
                stats = [path.stat() for path in files if path.exists()]
                if stats:
                    present.append((max(s.st_atime_ns for s in stats), sum(s.st_size for s in stats), files))
            used = sum(size for _, size, _ in present)
            for _, size, files in sorted(present, key=lambda entry: entry[0]):
                if used + num_bytes <= self._limit_bytes:
                    break
                for path in files:
                    path.unlink(missing_ok=True)
                used -= size


def fetch(
    remote: str, local: Path, timeout_seconds: float, *, check: Callable[[Path], None] = lambda fetched: None
) -> None:
    """Copy one remote file to `local`, which appears whole and after `check` of the temporary copy, or not at all.

    Failures that may pass are tried again, a little later each time.  Raises UserError naming `remote` if all fail or
    it takes too long.
    """
    deadline = time.monotonic() + timeout_seconds
    temporary = temporary_name(local)
    source = Path(remote.removeprefix("file://"))
    if "://" not in str(source) and exists(source):
        file_size(source)  # a FIFO in its place would only show when the time is over
    failure: list[BaseException] = []

    def work() -> None:
        for pause in (*_PAUSES, None):
            try:
                local.parent.mkdir(parents=True, exist_ok=True)
                download(remote, temporary)
                return
            except BaseException as error:
                if pause is None or time.monotonic() + pause > deadline or _is_final(error):
                    failure.append(error)
                    return
            time.sleep(pause)

    # A daemon thread, because not every downloader heeds its timeout and a dead mount blocks for ever: the process
    # must be able to report the file and exit while the thread still hangs.
    thread = threading.Thread(target=work, daemon=True, name=f"fetch {remote}")
    thread.start()
    thread.join(timeout_seconds)
    try:
        if thread.is_alive():
            raise UserError(
                f"{remote} was not fetched within fetch_timeout_seconds={timeout_seconds:g}; "
                "check the connection or allow more time"
            )
        if failure and _is_full(failure[0]):
            raise UserError(
                f"{remote} does not fit: no space left in {local.parent}; free some or set another data.path"
            )
        if failure:
            words = " ".join(str(failure[0]).split()) or type(failure[0]).__name__
            raise UserError(f"{remote} cannot be fetched ({words}); check data.remote and the access to it")
        check(temporary)
        try:
            os.replace(temporary, local)
        except OSError as error:
            raise UserError(
                f"{local} cannot be written ({reason(error)}); remove it or set another data.path"
            ) from None
    finally:
        for left in local.parent.glob(f"{temporary.name}*"):  # downloaders add endings of their own
            left.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other thread, process or machine uses, and that tells whose it is."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that are dead, and of other hosts those that nobody writes any more."""
    for path in folder.glob(".*.tmp*"):
        found = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{32}\.tmp.*", path.name)
        if found is None:
            continue
        try:
            if found[1] == _host():
                abandoned = not _runs(int(found[2]))
            else:
                abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
            if abandoned:
                path.unlink()
        except OSError:
            continue  # gone already, or not ours to remove


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would meet `error` again."""
    refused = any(400 <= status < 500 and status not in _PASSING for status in map(_http_status, _chain(error)))
    return isinstance(error, _FINAL) or not isinstance(error, Exception) or _is_full(error) or refused


def _http_status(error: BaseException) -> int:
    """Of the answer that `error`, of botocore, aiohttp or httpx, is about; 0 if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    status = getattr(error, "status", getattr(response, "status_code", 0))
    return status if isinstance(status, int) else 0


def _is_full(error: BaseException) -> bool:
    """Whether `error` is, or comes from, a disk or quota without room."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(isinstance(cause, OSError) and cause.errno in full for cause in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it comes from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
