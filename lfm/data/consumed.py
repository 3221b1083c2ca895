"""What the model was really fed: a digest of each optimizer step, a chain of them, and its record in the run folder.

    consumed.txt    one line a step: step, digest of its rows, chain; 16 and 32 hexadecimal digits

The digest of a row (`Batch.digest`) is a hash of its ids, document lengths and what else it has, seeded with its place
in the step.  A step's is their sum modulo 2**64, which any split into micro-batches and ranks gives alike, and no other
rows nor another order of them do.
Each chain value is a hash of the one before, the step and its digest: equal heads mean equal histories.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lfm.errors import UserError
from lfm.files import exists, keep_aside, read_file, read_lines, reason, shown, write_durably
from lfm.talk import complain

CONSUMED_NAME = "consumed.txt"
START = "0" * 32
"""The chain before the first step."""


def chained(chain: str, step: int, digest: int) -> str:
    """The chain after `step`, which consumed `digest`."""
    return hashlib.blake2b(f"{chain} {step} {digest:016x}".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Consumed:
    """One step of a record."""

    step: int
    digest: int
    chain: str


class ConsumedRecord:
    """Appends to a run's consumed.txt.  When that fails it says so, and training goes on.

    Steps that a full disk kept out are written when there is room again.  A file that cannot be read, or is none, is
    left as it is.
    """

    def __init__(self, folder: Path, *, resumed_step: int, chain: str) -> None:
        """Go on after `resumed_step`, as `truncate` does."""
        self._path = folder / CONSUMED_NAME
        self._works, self._failed = True, False
        self._size = 0
        """Of the whole lines on the disk."""
        self._waiting = ""
        """Whole lines that are not on the disk."""
        self.truncate(resumed_step, chain=chain)

    def truncate(self, step: int, *, chain: str) -> None:
        """Forget the steps after `step`: they happen again.  A record that did not lead to `chain` is kept under
        another name."""
        if not self._works:
            return
        try:
            last = self._cut_back(step, chain)
            if last < step:
                complain(f"{shown(self._path)} lacks steps {last + 1} to {step} of this run")
        except (UserError, OSError) as error:
            self._works = False
            complain(f"{shown(self._path)} is not written from now on: {error}")

    def _cut_back(self, step: int, chain: str) -> int:
        """The last step that is left."""
        lines = read_lines(self._path, _parsed) if exists(self._path) else []
        if self._waiting:  # a write that failed may have put some of these on the disk
            waiting = [(line, _parsed(line.rstrip())) for line in self._waiting.splitlines(keepends=True)]
            lines = [(line, entry) for line, entry in lines if entry.step < waiting[0][1].step] + waiting
        lines = [(line, entry) for line, entry in lines if entry.step <= step]
        if lines and lines[-1][1].step == step and lines[-1][1].chain != chain:
            aside = keep_aside(self._path, read_file(self._path), "abandoned")
            complain(f"{shown(self._path)} is of another history than the checkpoint's: it is kept as {aside.name}")
            lines = []
        kept = "".join(line for line, _ in lines).encode()
        if kept or exists(self._path):
            write_durably(self._path, kept)
        self._size, self._waiting = len(kept), ""
        return lines[-1][1].step if lines else 0

    def add(self, entry: Consumed) -> None:
        """Append one step."""
        if self._works:
            self._waiting += _line(entry)
            self._write(durably=False)

    def sync(self) -> None:
        """Force all steps so far to the disk."""
        if self._works and (self._waiting or self._size):
            self._write(durably=True)

    def _write(self, *, durably: bool) -> None:
        try:
            with open(self._path, "ab") as file:
                if self._failed:
                    file.truncate(min(self._size, file.tell()))  # without half a line
                file.write(self._waiting.encode())
                file.flush()
                if durably:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._failed:
                complain(f"{shown(self._path)} cannot be written ({reason(error)}); its steps wait until it can be")
            self._failed = True
            return
        self._size += len(self._waiting)
        self._waiting = ""
        if self._failed:
            complain(f"{shown(self._path)} is written again, and lacks nothing")
        self._failed = False


def read_record(folder: Path) -> list[Consumed]:
    """The steps of a run folder's record, in order.

    Raises UserError if there is none, if a step is missing between others, or if a chain value does not follow.
    """
    path = folder / CONSUMED_NAME
    try:
        lines = read_file(path).decode(errors="replace").split("\n")[:-1]  # without one that a crash cut short
    except UserError as error:
        raise UserError(f"{error}; give the folder of a run, runs/NAME") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_parsed(line))
        except ValueError:
            raise UserError(f"{path}: line {number} is damaged; restore it from a copy") from None
    if not found:
        raise UserError(f"{path} has no steps; give the folder of a run that has made one")
    chain = START if found[0].step == 1 else None
    for before, entry in zip([None, *found], found, strict=False):
        if before is not None and entry.step != before.step + 1:
            raise UserError(f"{path} goes from step {before.step} to step {entry.step}; restore it from a copy")
        if chain is not None and entry.chain != chained(chain, entry.step, entry.digest):
            raise UserError(
                f"{path} was changed: the chain of step {entry.step} does not follow; restore it from a copy"
            )
        chain = entry.chain
    return found


def _line(entry: Consumed) -> str:
    return f"{entry.step} {entry.digest:016x} {entry.chain}\n"


def _parsed(line: str) -> Consumed:
    found = re.fullmatch(r"(\d{1,18}) ([0-9a-f]{16}) ([0-9a-f]{32})", line)
    if found is None:
        raise ValueError(line)
    return Consumed(int(found[1]), int(found[2], 16), found[3])
