"""Files read without trusting what lies there, files that survive a crash, folders that one process holds alone."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lfm.errors import UserError

T = TypeVar("T")


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


def json_checksum(tree: dict[str, Any]) -> str:
    """sha256 of a JSON object without its own key `checksum`, which keeps it.

    It finds damage.  Whoever can change the object can make its checksum anew: it says nothing about who wrote it.
    """
    content = {key: value for key, value in tree.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: after a crash the file is the old one or the new one, whole.

    Where `path` is a link, the file that it leads to is replaced, and the link stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextmanager
def refusing(way_out: str) -> Iterator[None]:
    """What the system refuses within becomes a UserError that names the path, the reason and the way out."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename
        if path is None:
            raise UserError(f"{reason(error)}; {way_out}") from error
        raise UserError(f"{shown(Path(os.fsdecode(path)))} cannot be used ({reason(error)}); {way_out}") from error


def remove_tree(path: Path) -> None:
    """Delete a folder with all it holds, or a file; of a link, the link alone.  What cannot be deleted stays."""
    with suppress(OSError):
        path.unlink()  # fails for a folder
    shutil.rmtree(path, ignore_errors=True)


def read_lines(path: Path, parse: Callable[[str], T]) -> list[tuple[str, T]]:
    """The lines of a file that is only ever appended to, with what `parse` makes of each (without its newline).

    A last line that a crash cut short is left out.  So is any other for which `parse` raises ValueError, but since the
    caller is about to write the file anew, a copy of it is kept beside it then, and that is said.  Raises UserError
    when the file cannot be read.
    """
    data = read_file(path)
    found, damaged = [], []
    lines = data.split(b"\n")[:-1]  # behind the last newline lies nothing, or a line cut short
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
            found.append((text + "\n", parse(text)))
        except ValueError:
            damaged.append(number)
    if damaged:
        aside = keep_aside(path, data, "damaged")
        which = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        complain(f"{shown(path)}: {which} cannot be read and is left out; the file as it was is kept as {aside.name}")
    return found


def keep_aside(path: Path, data: bytes, why: str) -> Path:
    """Write the content of `path` beside it under the first free name `NAME.why-N`, which is returned."""
    number = 1
    while exists(aside := path.with_name(f"{path.name}.{why}-{number}")):
        number += 1
    write_durably(aside, data)
    return aside


def complain(text: str) -> None:
    """Print a warning; that it cannot be printed stops nothing."""
    with suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


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
        # Opening a FIFO to write waits for a reader, but for this flag; what lies there is not cut.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        raise UserError(f"{unwritable} ({reason(error)})") from None
    with os.fdopen(descriptor, "rb+", buffering=0):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{unwritable} ({shown(lock)} is not a regular file; remove it)")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        except OSError as error:
            raise UserError(f"{unwritable} ({reason(error)})") from None
        yield
