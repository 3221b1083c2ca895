"""Lines typed at a terminal: edited with readline where there is one, and remembered from session to session."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lfm.errors import UserError
from lfm.files import read_file, write_durably

try:
    import readline
except ImportError:  # a Python without it, as on Windows
    readline = None  # type: ignore[assignment]

NUM_LINES = 1000
"""Of the history, that are kept."""


def is_terminal() -> bool:
    """Whether a person types lines and sees what is printed."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def typed() -> str:
    """What stands in the line that is being typed, as far as that can be known."""
    return readline.get_line_buffer() if readline is not None and is_terminal() else ""


def history_file() -> Path | None:
    """`lfm/chat_history` in the user's folder for state; None where there is no such folder."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(folder):  # a relative one is to be ignored, its specification says
        return Path(folder) / "lfm/chat_history"
    home = os.path.expanduser("~")
    return Path(home) / ".local/state/lfm/chat_history" if os.path.isabs(home) else None


@contextmanager
def remembering() -> Iterator[list[str]]:
    """Put the lines of earlier sessions within reach of the arrow keys; those added to the list are kept for later.

    Nothing is read or kept where lines are not typed, and what cannot be read or kept is not: a history is a comfort.
    """
    lines: list[str] = []
    path = history_file() if readline is not None and is_terminal() else None
    if readline is not None and path is not None:
        for line in _read(path):
            readline.add_history(line)
    try:
        yield lines
    finally:
        lines = [line for line in lines if line.strip()]
        if path is not None and lines:
            # Read again: another session may have ended meanwhile.
            kept = "".join(f"{line}\n" for line in [*_read(path), *lines][-NUM_LINES:])
            with suppress(OSError):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_durably(path, kept.encode("utf-8", "surrogateescape"), mode=0o600)


def _read(path: Path) -> list[str]:
    try:
        lines = read_file(path).decode("utf-8", "surrogateescape").split("\n")
    except UserError:
        return []
    return [line for line in lines if line and "\0" not in line][-NUM_LINES:]
