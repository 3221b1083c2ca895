"""What a failed job says: the sentence of its first cause, then every rank's last phase and stack.

A beat is what a rank tells of itself about once a second: its rank, host, pid, phase, progress, and whether it ended.
A failure is what the ranks agree on: `kind`, `rank`, those `dead`, the exit `code`, `headline` and `details`.
"""

import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from lfm.errors import NonFiniteError
from lfm.exits import explained
from lfm.files import write_durably

_DISTRIBUTED = os.path.dirname(dist.__file__) + os.sep
_PEER_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|ProcessGroup", re.IGNORECASE)


class Raised(NamedTuple):
    """An exception that ended a rank's work, `at` which second of its clock."""

    error: BaseException
    at: float
    secondary: bool
    """See `is_secondary`."""


class MainThread:
    """The thread that makes this, seen from others; `own_files` hold the frames between it and the job's code."""

    def __init__(self, own_files: tuple[str, ...]) -> None:
        self._ident = threading.get_ident()
        own = (*own_files, __file__)
        callers = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename not in own]
        self._num_outer_frames = len(callers) - 1

    def stack(self) -> str:
        """Innermost call last, from the function that entered `watched`."""
        frame = sys._current_frames().get(self._ident)
        frames = traceback.extract_stack(frame)[self._num_outer_frames :] if frame is not None else []
        return "".join(traceback.format_list(frames)).rstrip()

    def waits_for_peers(self) -> bool:
        frame = sys._current_frames().get(self._ident)
        return frame is not None and frame.f_code.co_filename.startswith(_DISTRIBUTED)


def exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    told = explained(error)
    return told[1] if told else 1


def is_secondary(error: BaseException) -> bool:
    """Whether `error` tells of a lost peer: torch.distributed's own types, or a RuntimeError out of a collective."""
    if not isinstance(error, RuntimeError) or isinstance(error, NonFiniteError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and frames[-1].filename.startswith(_DISTRIBUTED)
    return inside or isinstance(error, dist.DistError) or _PEER_LOST.search(str(error)) is not None


# The failures.


def failure_of(raised: Raised, beat: Mapping[str, Any]) -> dict[str, Any]:
    """That the rank of `beat` raised an error."""
    error, rank = raised.error, beat["rank"]
    failure = {"kind": "error", "rank": rank, "dead": [], "code": exit_code(error), "details": ""}
    if told := explained(error):
        sentence = told[0].removeprefix("error: ")
        start = "error: " if sentence != told[0] else ""
        return failure | {"kind": "brief", "headline": f"{start}rank {rank}: {sentence}"}
    headline = f"error: {_name(beat)} failed in phase '{beat['phase']}': {one_line(error)}"
    if raised.secondary:
        headline += "\n(a lost peer is the likely cause, but no rank told of another error, died or hung)"
    return failure | {"headline": headline, "details": traceback_of(error)}


def early_end(by: SystemExit, beat: Mapping[str, Any]) -> dict[str, Any]:
    """That the rank of `beat` left by `sys.exit(0)`, if that left others alone."""
    headline = f"error: {_name(beat)} ended by sys.exit(0) in phase '{beat['phase']}', and the others went on"
    return {
        "kind": "error",
        "rank": beat["rank"],
        "dead": [],
        "code": 1,
        "details": traceback_of(by),
        "headline": headline,
    }


def death(beat: Mapping[str, Any], dead: list[int], silent_seconds: float) -> dict[str, Any]:
    """That nothing was heard of the rank of `beat`, its last, nor of the others of `dead`."""
    first = beat["rank"]
    headline = (
        f"error: {_name(beat)} died, was killed or is stopped: no sign of life for {silent_seconds:.0f} s; "
        f"its last phase: {beat['phase']}"
    )
    if len(dead) > 1:
        headline += f"; silent as well: {_ranks([rank for rank in dead if rank != first])}"
    return {"kind": "death", "rank": first, "dead": dead, "code": 1, "headline": headline, "details": ""}


def hang() -> dict[str, Any]:
    """That no rank goes on; which one hangs is seen when all have reported."""
    return {"kind": "hang", "rank": None, "dead": [], "code": 1, "headline": "", "details": ""}


# What is printed.


def told_alone(failure: Mapping[str, Any]) -> str:
    """What a rank says of its own error when there is no store to report to."""
    return "\n".join([failure["headline"], failure["details"]]).strip()


def lost_stores(beat: Mapping[str, Any], address: tuple[str, int], connection_error: str, stack: str) -> str:
    """What a rank without an error of its own says when both stores have gone."""
    host, port = address
    return (
        f"error: {_name(beat)} lost the job's store at {host}:{port} ({connection_error}) "
        f"and its second one: the processes that host them, or the network, are gone; "
        f"phase '{beat['phase']}'\n{stack}"
    )


def summary(
    failure: Mapping[str, Any], reports: Mapping[int, dict[str, Any]], beats: Mapping[int, dict[str, Any]]
) -> str:
    """The first cause, then every rank's last phase and stack, equal ones together.

    Every rank has either reported, or its last beat, if any, is in `beats`.
    """
    headline, details = failure["headline"], failure["details"]
    cause = failure["rank"] if failure["kind"] == "error" else None
    if failure["kind"] == "hang":
        running = [report for report in reports.values() if report["running"]] or list(reports.values())
        slowest = min(running, key=lambda report: (report["progress"], report["waits_for_peers"], report["rank"]))
        cause, details = slowest["rank"], slowest["stack"]
        headline = f"error: {_name(slowest)} hangs: {slowest['seconds']:.0f} s in phase '{slowest['phase']}'"
    groups: dict[tuple[str, str], list[int]] = {}
    for rank in sorted({*reports, *beats}):
        if rank == cause and rank in reports:
            told, stack = f"in phase '{reports[rank]['phase']}'", "  see above"
        elif rank in reports:
            state = "after its end, waiting for the others" if not reports[rank]["running"] else ""
            state = "raised an error as well" if reports[rank]["raised"] else state
            told, stack = f"in phase '{reports[rank]['phase']}'{state and ', ' + state}", reports[rank]["stack"]
        else:
            beat = beats[rank]
            told = "ended without error" if beat["ended"] else f"no report; last phase: '{beat['phase']}'"
            stack = ""
        groups.setdefault((told, stack), []).append(rank)
    lines = [headline, *([details] if details else []), "", "Last phase and main thread of every rank:"]
    for (told, stack), ranks in groups.items():
        lines += [f"{_ranks(ranks)}: {told}", *([stack] if stack else [])]
        errors = [reports[rank]["raised"] for rank in ranks if rank in reports and rank != cause]
        lines += [f"  {error}" for error in errors[:1] if error]
    return "\n".join(lines)


def publish(text: str, file: Path | None = None) -> None:
    """Print to stderr and write to `file`, if its folder exists; that neither can be stops nothing."""
    try:
        print(text, file=sys.stderr, flush=True)
        if file is not None and file.parent.is_dir():
            write_durably(file, (text + "\n").encode(errors="backslashreplace"))
    except OSError:
        pass  # a closed terminal or a full disk: the end goes on


def leave(code: int) -> NoReturn:
    """End this process, from any thread."""
    # The main thread may hold a stream's lock for as long as it hangs.
    flushing = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def traceback_of(error: BaseException, *, header: bool = True) -> str:
    """Without the frame of `watched` itself, which is the outermost."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    lines = traceback.format_exception(type(error), error, frames) if header else traceback.format_tb(frames)
    return "".join(lines).rstrip()[-20_000:]


def _name(beat: Mapping[str, Any]) -> str:
    return f"rank {beat['rank']} (pid {beat.get('pid', 'unknown')}, host {beat.get('host', 'unknown')})"


def _ranks(ranks: list[int]) -> str:
    """[0, 2, 3, 4] is "ranks 0, 2-4"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(spans)
