"""Files read without trusting what lies there, files that survive a crash, folders that one process holds alone."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lfm.errors import UserError


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, at once whatever lies there.

    Raises UserError naming the file when there is none, or it is a folder, a FIFO, a device or a loop of links, or may
    not be read.
    """
    try:
        # Opening a FIFO waits for a writer, and some devices wait for ever, but for this flag.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{shown(path)} is not a regular file; put the file itself there")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.  Raises UserError as `open_file` does, and when reading fails."""
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read ({reason(error)})") from error


def exists(path: Path) -> bool:
    """Whether anything, a broken link too, has this name.

    Raises UserError when that cannot be found out: a folder that may not be searched is not an absent file.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be looked at ({reason(error)})") from error
    return True


def listed(folder: Path) -> list[Path]:
    """What `folder` holds, by name; nothing when there is no such folder.  Raises UserError when it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"folder {shown(folder)} cannot be read ({reason(error)})") from error


def shown(path: Path) -> str:
    """A path as it can be printed anywhere: bytes that are no UTF-8 and control characters escaped, the middle cut."""

    def escaped(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"

    text = "".join(map(escaped, str(path)))
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]} ({len(text):,} characters)"


def reason(error: BaseException) -> str:
    """Why the system refused, in its own words, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def ready_folder(folder: Path) -> None:
    """Make `folder` if it is missing, so that work whose result goes there is not begun in vain.

    Raises UserError when it cannot be made or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"folder {shown(folder)} cannot be written ({reason(error)})") from None


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: after a crash the file is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(folder: Path, *, by: Path) -> None:
    """Give `by`, whose files are on the disk, the name `folder`; what has that name is removed."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    by.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def held_alone(lock: Path, *, unwritable: str, taken: str) -> Iterator[None]:
    """Hold `lock`, which the system releases however this process ends.

    Raises UserError: `unwritable` and the reason when it cannot be made, `taken` when another process holds it.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        raise UserError(f"{unwritable} ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        yield
