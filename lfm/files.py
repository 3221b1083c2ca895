"""Files read without trusting what lies there, files that survive a crash, folders that one process holds alone."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lfm.errors import UserError, without_passwords
from lfm.talk import complain

T = TypeVar("T")

_NEW, _OLD = ".new.partial", ".old.partial"
"""In a mount point, what will be and what was in it."""
_OF_THE_FILE_SYSTEM = "lost+found"


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


def file_size(path: Path) -> int:
    """Bytes in a regular file that can be read.  Raises UserError as `open_file` does."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


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


def shown(path: Path | str) -> str:
    """A path or URL as it can be printed anywhere.

    Bytes that are no UTF-8 and control characters are escaped, a password is ***, and the middle of a long one is cut.
    """

    def escaped(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"

    text = "".join(map(escaped, without_passwords(str(path))))
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


def write_out(path: Path, data: bytes) -> None:
    """Write to where the user says, which may be /dev/stdout or a pipe.

    Raises OSError at once for a FIFO that nobody reads, which would wait for a reader for ever.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        os.set_blocking(descriptor, True)  # a reader may be slow
        file.write(data)


def write_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace `path` by `data` in one step: after a crash the file is the old one or the new one, whole.

    Where `path` is a link, the file that it leads to is replaced, and the link stays.  `mode` is of the new file,
    less what the process's umask takes away.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left of `write_durably` in `folder`, which no other process may be writing to."""
    for path in listed(folder):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def refusing(way_out: str, *, at: Path | None = None) -> Iterator[None]:
    """What the system refuses within becomes a UserError that names the path, the reason and the way out.

    A full disk names no path: `at` is what was being written.
    """
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename or at
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


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(text: Path | str) -> Path:
    """The path that a user wrote, with ~ filled in.

    Raises UserError for one that no file can have: of an unknown user's home, with a NUL, too long, a loop of links.
    """
    if str(text) == "":
        raise UserError("'' is no path; give the name of a file or folder")
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except RuntimeError:
        user = shown(Path(text).parts[0])
        raise UserError(f"{shown(text)}: the home folder of {user} is not known; write the path in full") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            return Path(text).expanduser()  # what it leads to, if anything, is for those to say who open it
        raise UserError(f"{shown(text)} is no path that can be used ({reason(error)}); choose another") from None
    return path


def behind_links(folder: Path) -> Path:
    """Where `folder`, which need not exist, really is: links, its own too, are followed.

    Raises UserError for a loop of links.
    """
    real = Path(os.path.realpath(folder))
    if real.is_symlink():
        raise UserError(f"{shown(folder)} is a loop of links; remove it or choose another folder")
    return real


def partial_folder(folder: Path) -> Path:
    """Where to build what `replace_folder` gives the name `folder`: on the same disk, under a hidden name."""
    folder = behind_links(folder)
    return folder / _NEW if _is_mount_point(folder) else folder.with_name(f".{folder.name}.partial")


def is_free(folder: Path) -> bool:
    """Whether nothing is lost when `folder` is replaced: it is absent, empty, or a mount point with what is always
    there, or with what a `replace_folder` that was killed left.
    """
    if not exists(folder):
        return True
    if not folder.is_dir():
        return False
    return exists(folder / _OLD) or all(path.name in (_NEW, _OF_THE_FILE_SYSTEM) for path in listed(folder))


def replace_folder(folder: Path, *, by: Path) -> None:
    """Give `by`, which is `partial_folder(folder)` and on the disk, the name `folder`; what has that name is removed.

    What `folder` leads to through links is replaced, not the link.  A mount point cannot be renamed: then all that is
    in it makes room first and what is in `by` follows, so that at no time a part of each can be read as one.
    """
    folder = behind_links(folder)
    if by.parent == folder:
        old = folder / _OLD
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        for source, target in ((folder, old), (by, folder)):
            for path in listed(source):
                if path not in (by, old) and path.name != _OF_THE_FILE_SYSTEM:
                    path.rename(target / path.name)
            sync(folder)
        by.rmdir()
    else:
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if exists(folder):
            folder.rename(old)
        try:
            by.rename(folder)
        except OSError:
            if exists(old):
                old.rename(folder)
            raise
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_mount_point(folder: Path) -> bool:
    """Also of a folder of the same disk, which `os.path.ismount` takes for an ordinary one."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(folder)
    # The fifth field, in which blanks and backslashes are octal numbers.
    points = (re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]) for line in mounts)
    return os.fsencode(folder) in points


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
