"""What a program says while it works: where nobody hears it, the work goes on."""

import contextlib
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

PATIENCE_SECONDS = 1.0
"""How long a line waits for a full pipe or a stopped terminal, while there is other work, before it is dropped."""

_ERRORS = "backslashreplace"
"""What becomes of characters that an encoding has not.  Without a name for it `input` would edit no lines."""


class Voice(io.TextIOBase):
    """A text stream to a file descriptor whose writes never fail; what cannot be written is dropped.

    `patience`: seconds that a write waits for a pipe or terminal that nobody reads; None: without end.  `strict`:
    writes do fail, with the OSError that stays in `lost`.  Nothing is kept for later, so that neither a later write nor
    the interpreter's end meets an old error again.
    """

    def __init__(self, descriptor: int, *, encoding: str, patience: float | None, strict: bool = False) -> None:
        self._descriptor, self._encoding, self._patience, self._strict = descriptor, encoding, patience, strict
        self._pending, self._heard = "", True
        self.lost: OSError | None = None
        # Threads speak too, and a handler of a signal may.
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return _ERRORS

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            self._pending += text
            if "\n" in text:
                self._send()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        data = memoryview(self._pending.encode(self._encoding, _ERRORS))
        self._pending = ""
        try:
            while data and self._has_room():
                # So much goes into a pipe with room at once: a longer write would wait for the reader.
                data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]
        except OSError as error:
            self.lost = error
            if self._strict:
                raise

    def _has_room(self) -> bool:
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        patience = None if self._patience is None else self._patience * 1000 * self._heard
        self._heard = bool(room.poll(patience))
        return self._heard


@contextlib.contextmanager
def talking(patience: float | None = PATIENCE_SECONDS, *, strict: bool = False) -> Iterator[None]:
    """While it is entered, no code that prints, warns, logs or draws a bar fails by it, nor waits longer.

    `strict`: but what is printed to stdout.  It is about the streams of a process: what others put in their place, a
    notebook say, stays there.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _voice(sys.stdout, patience, strict), _voice(sys.stderr, patience)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Voice):
                with contextlib.suppress(OSError):
                    stream.flush()
        sys.stdout, sys.stderr = before


def say(line: str) -> None:
    """Print a line to stdout at once, beside a progress bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a line to stderr at once, beside a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def _voice(stream: TextIO | None, patience: float | None, strict: bool = False) -> Any:
    if stream is not None and not isinstance(stream, Voice) and type(stream) is not io.TextIOWrapper:
        return stream
    try:
        if stream is not None:  # else its descriptor was closed, and may be any file's by now
            stream.flush()
            return Voice(stream.fileno(), encoding=stream.encoding, patience=patience, strict=strict)
    except (OSError, ValueError):
        pass
    return Voice(os.open(os.devnull, os.O_RDONLY), encoding="utf-8", patience=patience, strict=strict)


def complain(text: str) -> None:
    """Print a warning; that it cannot be printed stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        warn(f"warning: {text}")
