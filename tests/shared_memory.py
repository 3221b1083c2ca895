import time
from pathlib import Path

_FOLDER = Path("/dev/shm")


def abandoned(before: set[str], *, within_seconds: float = 10.0) -> set[str]:
    """New names in /dev/shm, since there were `before`, that no living process has mapped: whoever made them is gone.

    Other programs may make and unmake their own meanwhile.
    """
    deadline = time.monotonic() + within_seconds
    while True:
        left = names() - before
        mapped = "".join(_maps(process) for process in Path("/proc").glob("[0-9]*"))
        left = {name for name in left if f"{_FOLDER}/{name}" not in mapped} & names()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def names() -> set[str]:
    """What is in /dev/shm now."""
    return {path.name for path in _FOLDER.iterdir()}


def _maps(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:  # it ended, or is another user's
        return ""
