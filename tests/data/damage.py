"""What can happen to a file."""

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def flip(path: Path, byte: bytes = b"") -> None:
    """One bit in its middle, or of the first such byte after it."""
    content = bytearray(path.read_bytes())
    content[content.index(byte, len(content) // 2)] ^= 0x10
    path.write_bytes(content)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    """To half its length."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_folder(path: Path) -> None:
    """In the file's place."""
    discard(path)
    path.mkdir()


def put_loop(path: Path) -> None:
    """A link that leads to itself."""
    discard(path)
    path.symlink_to(path.name)


def put_fifo(path: Path) -> None:
    """Which nobody writes to."""
    discard(path)
    os.mkfifo(path)


def forbid(path: Path) -> None:
    """Which holds for root too, `without_privileges`."""
    path.chmod(0)


def discard(path: Path) -> None:
    """Whatever lies there, a folder with all that is in it too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root without the right to read what its permissions forbid, in this thread and those that it starts.

    Skips the test where the system does not let go of that right.
    """
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, sets)
    kept = sets[0]
    sets[0] &= ~0b110  # of the effective set, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capset(header, sets) != 0:
        pytest.skip("capabilities cannot be dropped here, and root reads everything with them")
    try:
        yield
    finally:
        sets[0] = kept
        libc.capset(header, sets)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what hangs, such as the opening of a FIFO, by a TimeoutError."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
