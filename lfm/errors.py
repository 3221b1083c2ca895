"""How commands end: the user's mistake as one sentence that names thing, value and way out, and exit code 2."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user typed, or a file the user pointed at, is wrong.  `str(error)` is one clear sentence."""


class ProcessError(UserError):
    """A UserError that the job's other processes need not meet: every process that does says so."""


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is NaN or infinite; the update was not made.  Exit code 3."""


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
    """Wrap a command's `main`: expected ends become one line on stderr and an exit code; bugs keep their traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        if not (args or kwargs):
            _read_arguments_as_utf8()
        _write_utf8()
        try:
            main(*args, **kwargs)
        except (UserError, NonFiniteError) as error:
            # Before they are joined, all processes of a job find the same mistake: one of them says so.
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            if rank == "0" or isinstance(error, ProcessError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, UserError) else 3)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)

    return run
