"""Checkpoints: torch.distributed.checkpoint with global names, never half-written, always verified.

    checkpoints/step_00000100/
        __R_*.distcp, .metadata tensors `master.* moving.* frozen.*` and the optimizer's, one global tensor a name
        tokenizer.json          so that a checkpoint generates text on its own
        manifest.json           step, resolved config, counters; size and xxh3-64 of every file above; a checksum

A checkpoint is written under a temporary name, synced, given its manifest, and renamed: a folder called `step_*` is
whole or was damaged later, which the hashes find.  `lfm.checkpoint.saver` writes them; here they are found and read.
Nothing that their files name is run: see `lfm.checkpoint.stored_tensors`.
"""

import os
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from lfm.checkpoint.manifest import MANIFEST_NAME, way_out
from lfm.errors import UserError
from lfm.files import exists, expanded, listed, open_file, reason, remove_tree, shown

TEMPORARY = ".writing-"
# DCP says so each time `no_dist` asks for it.  Not in a context: those are not safe beside a thread that saves.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first.  Unfinished ones, and copies under other names, are not seen.

    Raises UserError when it cannot be found out which there are.
    """
    found = [path for path in listed(folder) if re.fullmatch(r"step_\d{8,}", path.name)]
    for path in found:
        if not os.path.isdir(path):  # a link to a disk that is not there now, say: training must not go on before it
            raise UserError(f"{shown(path)} has the name of a checkpoint and is no folder; restore it, or remove it")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


BEST = "best"
"""Link in a run's checkpoint folder to the one with the best validation loss."""


def mark_best(checkpoint: Path) -> None:
    """Point the link at this checkpoint, at once."""
    new, best = checkpoint.with_name(f"{TEMPORARY}{BEST}"), checkpoint.with_name(BEST)
    remove_tree(new)
    new.symlink_to(checkpoint.name)
    if exists(best) and not best.is_symlink():  # as a copy of the run has it that was made with links followed
        _set_aside(best, "there is a better one")
    os.rename(new, best)


def set_newer_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `abandoned_*`: a run that goes on from `step` leaves their branch."""
    for path in whole_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            _set_aside(path, f"this run goes on from step {step}")
    best = folder / BEST
    if best.is_symlink() and not os.path.exists(best):
        best.unlink()


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"abandoned_{path.name}")
    remove_tree(aside)
    os.rename(path, aside)
    print(f"{path.name} is now {aside.name}: {why}", flush=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a crash left half-written or half-removed."""
    for path in listed(folder):
        if path.name.startswith(TEMPORARY):
            remove_tree(path)


def remove(checkpoint: Path) -> None:
    """Delete under a name that is not taken for a checkpoint, should the process die half-way; of a link, the link."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    remove_tree(doomed)


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of the run folder it names."""
    path = expanded(path)
    if exists(path / MANIFEST_NAME) or (path.name.startswith("step_") and exists(path)):
        return path
    found = whole_checkpoints(path / "checkpoints") or whole_checkpoints(path)
    if not found:
        raise UserError(
            f"{shown(path)} is neither a checkpoint nor a run folder with one; give runs/NAME or a step_* folder"
        )
    return found[-1]


def verify(checkpoint: Path, manifest: dict[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
    """Raises UserError, naming the file, unless this rank's files have the size and hash of the manifest.

    The ranks share the files out by size; one rank's error is for the caller to tell the others.
    """
    files = manifest["files"]
    mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::world_size]
    for name in mine:
        file, expected = checkpoint / name, files[name]["bytes"]
        if not exists(file):
            raise UserError(f"checkpoint file {file} is missing; {way_out(checkpoint)}")
        with open_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size != expected:
            raise UserError(f"checkpoint file {file} has {size} bytes instead of {expected}; {way_out(checkpoint)}")
    for name, entry in hash_files(checkpoint, mine, io_threads(world_size)).items():
        if entry != files[name]:
            raise UserError(f"checkpoint file {checkpoint / name} is corrupt (hash differs); {way_out(checkpoint)}")


def io_threads(world_size: int) -> int:
    """Threads by which each of `world_size` ranks reads or writes files; up to eight ranks share a host."""
    return max(1, min(16, (os.cpu_count() or 1) // min(world_size, 8)))


def hash_files(folder: Path, names: Iterable[str], threads: int) -> dict[str, dict[str, Any]]:
    """Size and xxh3-64 of files, several at a time (hashing releases the interpreter lock)."""

    def digest(name: str) -> tuple[str, dict[str, Any]]:
        hasher, size = xxhash.xxh3_64(), 0
        with open_file(folder / name) as file:
            try:
                while block := file.read(2**24):
                    hasher.update(block)
                    size += len(block)
            except OSError as error:
                raise UserError(f"{shown(folder / name)} cannot be read ({reason(error)})") from error
        return name, {"bytes": size, "xxh3_64": hasher.hexdigest()}

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(digest, names))
