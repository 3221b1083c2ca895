"""The user's mistakes: one sentence that names the thing, its value and the way out; exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user typed, or a file the user pointed at, is wrong.  `str(error)` is one clear sentence."""


def fail(error: UserError) -> NoReturn:
    """Print `error` and end the process with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's `main`: a `UserError` becomes one line on stderr and exit code 2; bugs keep their traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            fail(error)

    return run
