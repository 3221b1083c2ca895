"""The processes that started this one: whether they still run."""

import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

_LAUNCHER = re.compile(
    r"(deepspeed|torchrun)(\.\w+)*|torch\.distributed\.(run|launch)|mpirun|mpiexec|[op]rterun|[op]rted|srun|slurmstepd"
)


class Launchers:
    """The processes that started this one, as far up as they are launchers; made early, while they still live.

    A launcher that is killed leaves its ranks running, which then hold devices that nobody accounts for.
    """

    def __init__(self) -> None:
        self._chain: list[tuple[int, str, str]] = []
        pid = os.getppid()
        while (process := _process(pid)) is not None and (name := _launcher_name(pid)) is not None:
            self._chain.append((pid, process.start, name))
            pid = process.parent

    def gone(self) -> str | None:
        """The launcher that no longer runs, for a message, or None.  Always None where there is no /proc."""
        for pid, start, name in self._chain:
            process = _process(pid)
            if process is None or process.state in "ZX" or process.start != start:
                return f"{name} (pid {pid})"
        return None


class _Process(NamedTuple):
    state: str
    parent: int
    start: str


def _process(pid: int) -> _Process | None:
    try:
        # The program's name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(fields[0], int(fields[1]), fields[19])


def _launcher_name(pid: int) -> str | None:
    """How the launcher is called, or None for another program.  Arguments that merely mention one do not count."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    program = os.path.basename(words[0].split(":")[0])  # slurmstepd calls itself "slurmstepd: [job.step]"
    if program.startswith("python"):
        options = list(itertools.takewhile(lambda word: word.startswith("-") and word != "-m", words[1:]))
        rest = words[1 + len(options) :]
        program = rest[1] if rest[0] == "-m" else os.path.basename(rest[0])
    return program if _LAUNCHER.fullmatch(program) else None
