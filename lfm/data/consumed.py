"""What the model was really fed: a digest of each optimizer step, a chain of them, and its record in the run folder.

    consumed.txt    one line a step: step, digest of its rows, chain; 16 and 32 hexadecimal digits

The digest of a row is a hash of its ids and document lengths, seeded with its place in the step.  A step's is their sum
modulo 2**64, which any split into micro-batches and ranks gives alike, and no other rows nor another order of them do.
Each chain value is a hash of the one before, the step and its digest: equal heads mean equal histories.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from lfm.errors import UserError
from lfm.files import read_file, sync, write_durably

CONSUMED_NAME = "consumed.txt"
START = "0" * 32
"""The chain before the first step."""


def rows_digest(ids: torch.Tensor, doc_lengths: Sequence[Sequence[int]], *, first: int = 0) -> int:
    """The digest, 64 bits, of rows `first`, `first` + 1, ... of a step: `ids [R, T]` on the host, and their documents.

    Digests of parts of a step add up to the whole step's modulo 2**64.
    """
    assert ids.dtype == torch.int64 and ids.device.type == "cpu"
    total = 0
    for place, (row, lengths) in enumerate(zip(ids.numpy(), doc_lengths, strict=True), start=first):
        digest = xxhash.xxh3_64(np.ascontiguousarray(row).data, seed=place)
        digest.update(np.asarray(lengths, np.int64).data)
        total += digest.intdigest()
    return total % 2**64


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
    """Appends to a run's consumed.txt.  When that fails it says so and gives up: training goes on."""

    def __init__(self, folder: Path, *, resumed_step: int, chain: str) -> None:
        """Steps after `resumed_step` are forgotten: they happen again.  So are all that did not lead to `chain`."""
        self._path = folder / CONSUMED_NAME
        self._works = True
        with self._giving_up():
            if self._path.exists():
                kept = [entry for entry in _lines(self._path) if entry.step <= resumed_step]
                if kept and kept[-1].step == resumed_step and kept[-1].chain != chain:
                    kept = []
                write_durably(self._path, "".join(_line(entry) for entry in kept).encode())

    def add(self, entry: Consumed) -> None:
        """Append one step."""
        with self._giving_up():
            if self._works:
                with open(self._path, "a") as file:
                    file.write(_line(entry))

    def sync(self) -> None:
        """Force all steps so far to the disk."""
        with self._giving_up():
            if self._works and self._path.exists():
                sync(self._path)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._works = False
            print(f"warning: {self._path} is not written from now on: {error!r}", file=sys.stderr, flush=True)


def read_record(folder: Path) -> list[Consumed]:
    """The steps of a run folder's record, in order.

    Raises UserError if there is none, if a step is missing between others, or if a chain value does not follow.
    """
    path = folder / CONSUMED_NAME
    try:
        num_lines = read_file(path).count(b"\n")  # what a crash cut short has none
    except UserError as error:
        raise UserError(f"{error}; give the folder of a run, runs/NAME") from None
    found = list(_lines(path))
    if found and len(found) < num_lines:
        raise UserError(f"{path} is damaged in line {len(found) + 1}; restore it from a copy")
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


def _lines(path: Path) -> Iterator[Consumed]:
    """The whole lines of a record, up to one that a crash cut short."""
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        found = re.fullmatch(r"(\d+) ([0-9a-f]{16}) ([0-9a-f]{32})\n", line)
        if found is None:
            return
        yield Consumed(int(found[1]), int(found[2], 16), found[3])
