"""What can happen to a file."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(path: Path) -> None:
    """One bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
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


def remove_all(path: Path) -> None:
    """Removes whatever lies there, a folder too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_folder(path: Path) -> None:
    remove_all(path)
    path.mkdir()


def put_link_loop(path: Path) -> None:
    remove_all(path)
    path.symlink_to(path.name)


def put_fifo(path: Path) -> None:
    """Nobody writes into it: who opens it to read waits for ever, and who opens it to write too."""
    remove_all(path)
    os.mkfifo(path)


def forbid(path: Path) -> None:
    """Means something to root only within `obeying_modes`."""
    path.chmod(0)


@contextmanager
def obeying_modes() -> Iterator[None]:
    """Within it this thread, and those that it starts, may read and write what file modes allow, even as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the capability interface's third version; this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and again for capabilities from 32 on
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    before = sets[0]
    sets[0] = before & ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
