"""How processes end: the user's mistake as one sentence that names thing, value and way out, and exit code 2."""

import contextlib
import errno
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from lfm.errors import NonFiniteError, UserError
from lfm.files import reason, shown
from lfm.talk import talking, warn


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit code of an expected end; None of a bug, which needs its traceback."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, NonFiniteError):
        return f"error: {error}", 3
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError):
        return f"error: {_refusal(error)}", 2
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return f"error: a path holds a NUL character, {_where(error)}; give one without", 2
    return None


def _read_arguments_as_utf8() -> None:
    """Start the process again in Python's UTF-8 mode where the locale reads arguments and file names as another code.

    Some locales do so without an error: in Latin-1, an accented letter becomes two others, which would be trained on.
    """
    mode = ["-X", "utf8"]
    if sys.getfilesystemencoding() == "utf-8" or sys.orig_argv[1:3] == mode:
        return
    os.environ["PYTHONUTF8"] = "1"  # processes that this one starts
    os.execv(sys.executable, [sys.executable, *mode, *sys.orig_argv[1:]])


def _write_utf8() -> None:
    """Make both streams write UTF-8, whatever the locale, and escaped what is none, as in some file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none, nor is a closed one
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's `main`: expected ends become one line on stderr and an exit code; bugs keep their traceback.

    What a command prints to stdout is what it is for: when that cannot be written, it ends with exit code 2, or, when
    its reader wanted no more (`| head`), without a word as other programs do, 128 + SIGPIPE.  Work that goes on however
    its words fare is done within `talking`.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        if not (args or kwargs):
            _read_arguments_as_utf8()
        _open_closed_streams()
        _write_utf8()
        with talking(None, strict=True):
            try:
                main(*args, **kwargs)
                sys.stdout.flush()
                error = None
            except BaseException as raised:
                error = raised
            lost = getattr(sys.stdout, "lost", None)
            ended_well = error is None or (isinstance(error, SystemExit) and not error.code)
            if lost is not None and (ended_well or error is lost):
                if lost.errno == errno.EPIPE:
                    sys.exit(141)
                error = UserError(f"the standard output cannot be written ({lost.strerror}); give it another place")
            told = error and explained(error)
            if told:
                if os.environ.get("LFM_TRACEBACK") and error is not None:
                    warn("".join(traceback.format_exception(error)).rstrip())
                warn(told[0])
                sys.exit(told[1])
        if error is not None:
            raise error

    return run


def _refusal(error: OSError) -> str:
    if error.filename is None:
        return f"{reason(error)}, {_where(error)}"
    name = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"{shown(Path(str(name)))}: {reason(error)}"


def _where(error: BaseException) -> str:
    """The innermost place of this project's code on the way of `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    frame = (own or frames)[-1]
    return f"at line {frame.lineno} of {os.path.basename(frame.filename)}"


def _open_closed_streams() -> None:
    """A descriptor 0, 1 or 2 that was closed would be given to the next file opened, which prints would damage."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
