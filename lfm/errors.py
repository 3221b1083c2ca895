"""How commands end: the user's mistake as one sentence that names thing, value and way out, and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user typed, or a file the user pointed at, is wrong.  `str(error)` is one clear sentence."""


class ProcessError(UserError):
    """A UserError that the job's other processes need not meet: every process that does says so."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a weight or a logit is NaN or infinite; nothing is made of it.  Exit code 3."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's `main`: expected ends become one line on stderr and an exit code; bugs keep their traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
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
