"""Checkpoints: torch.distributed.checkpoint with global names, never half-written, always verified.

    checkpoints/step_00000100/
        __R_*.distcp, .metadata tensors `master.* exp_avg.* exp_avg_sq.* frozen.*`, one global tensor a name
        tokenizer.json          so that a checkpoint generates text on its own
        manifest.json           step, resolved config, counters, RNG; size and xxh3-64 of every file above

A checkpoint is written under a temporary name, synced, given its manifest, and renamed: a folder called `step_*` is
whole or was damaged later, which the hashes find.  `lfm.training.saver` writes them; here they are found and read.
"""

import base64
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.tensor import DTensor

from lfm.config import Config, Count, CountOrZero, PathText
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import expanded
from lfm.models.global_names import global_views
from lfm.models.language_model import LanguageModel
from lfm.models.registry import ModelConfig, build, parse
from lfm.training.engine import materialize

FORMAT = 1
TEMPORARY = ".writing-"
# DCP says so each time `no_dist` asks for it.  Not in a context: those are not safe beside a thread that saves.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointConfig(Config):
    every_steps: CountOrZero = 1000
    """0: only at the end and on a signal."""
    save_at_end: bool = True
    asynchronous: bool = True
    """Write in the background; costs host memory of one copy of the state; at most one save is under way."""
    keep: Count = 2
    """Newest checkpoints kept; older ones are removed after a newer one is whole."""
    keep_best: bool = False
    """Save after each validation with the lowest loss so far, and keep that checkpoint too: checkpoints/best."""
    resume: PathText = "auto"
    """auto: go on from the run's newest checkpoint, if any; never: refuse a run folder that has one; or a path."""
    init_from: PathText | None = None
    """Run or checkpoint whose weights alone start this run (continued pre-training); optimizer and data start anew."""


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first.  Unfinished ones, and copies under other names, are not seen."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


BEST = "best"
"""Link in a run's checkpoint folder to the one with the best validation loss."""


def mark_best(checkpoint: Path) -> None:
    """Point the link at this checkpoint, at once."""
    new = checkpoint.with_name(f"{TEMPORARY}{BEST}")
    new.unlink(missing_ok=True)
    new.symlink_to(checkpoint.name)
    os.rename(new, checkpoint.with_name(BEST))


def set_newer_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `abandoned_*`: a run that goes on from `step` leaves their branch."""
    for path in whole_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            print(f"{path.name} is now {aside.name}: this run goes on from step {step}", flush=True)
    best = folder / BEST
    if best.is_symlink() and not best.exists():
        best.unlink()


def remove_unfinished(folder: Path) -> None:
    """Delete what a crash left half-written or half-removed."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Delete under a name that is not taken for a checkpoint, should the process die half-way."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of the run folder it names."""
    path = expanded(path)
    if (path / "manifest.json").exists() or (path.name.startswith("step_") and path.exists()):
        return path
    found = whole_checkpoints(path / "checkpoints") or whole_checkpoints(path)
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor a run folder with one; give runs/NAME or a step_* folder")
    return found[-1]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after checking that it is one of ours.  Raises UserError."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {checkpoint} has no readable manifest.json ({error}); {_way_out(checkpoint)}"
        ) from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {checkpoint} has format {manifest.get('format')}; this version reads {FORMAT}")
    return manifest


def verify(checkpoint: Path, manifest: dict[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
    """Raises UserError, naming the file, unless this rank's files have the size and hash of the manifest.

    The ranks share the files out by size; one rank's error is for the caller to tell the others.
    """
    files = manifest["files"]
    mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::world_size]
    for name in mine:
        file, entry = checkpoint / name, files[name]
        if not file.exists():
            raise UserError(f"checkpoint file {file} is missing; {_way_out(checkpoint)}")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"checkpoint file {file} has {file.stat().st_size} bytes instead of {entry['bytes']}; "
                f"{_way_out(checkpoint)}"
            )
    for name, entry in hash_files(checkpoint, mine, io_threads(world_size)).items():
        if entry != files[name]:
            raise UserError(f"checkpoint file {checkpoint / name} is corrupt (hash differs); {_way_out(checkpoint)}")


def check_architecture(checkpoint: Path, manifest: dict[str, Any], model: ModelConfig) -> None:
    """Raises UserError, naming the first key that differs, unless `model` has the tensors of the checkpoint."""
    stored, wanted = _flatten(manifest["config"]["model"]), _flatten(model.model_dump(mode="json"))
    if stored["kind"] != wanted["kind"]:
        raise UserError(
            f"checkpoint {checkpoint} is of family {stored['kind']} and the config of family {wanted['kind']}; "
            "give a checkpoint of the same family, or start a new run (name=NAME)"
        )
    for key in sorted(stored.keys() | wanted.keys()):
        if key not in model.changeable and stored.get(key) != wanted.get(key):
            raise UserError(
                f"checkpoint {checkpoint} is of another architecture: model.{key} is {stored.get(key)!r} there and "
                f"{wanted.get(key)!r} in the config; set it alike, or start a new run (name=NAME)"
            )


_HASHED = (torch.float32, torch.bool, torch.int32)
"""Dtypes in which frozen tensors are stored: one that was asked for in another cannot be compared with its hash."""


def load_tensors(checkpoint: Path, manifest: dict[str, Any], targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (key -> tensor, any dtype and device) in place; of a DTensor, this rank's shard.

    Not collective: every rank may ask for other keys.  Whole frozen tensors are checked against their hashes.
    """
    missing = targets.keys() - FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys()
    if missing:
        raise UserError(f"checkpoint {checkpoint} lacks {sorted(missing)[0]} (and {len(missing) - 1} more)")
    dcp_load(dict(targets), checkpoint_id=checkpoint, no_dist=True)
    for name, expected in manifest["frozen"].items():
        target = targets.get(name)
        if target is None or isinstance(target, DTensor) or target.dtype not in _HASHED:
            continue
        if tensor_hash(target) != expected:
            raise UserError(f"frozen tensor {name} of {checkpoint} does not match its hash; {_way_out(checkpoint)}")


def load_model(
    path: Path | str, *, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, dict[str, Any], Path]:
    """A verified checkpoint's model in evaluation mode, its manifest, and the checkpoint's path."""
    checkpoint = find(Path(path))
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    config = parse(manifest["config"]["model"], source=str(checkpoint / "manifest.json"))
    model = materialize(lambda: build(config), device=device, dtype=dtype)
    views = global_views(model, lambda _, tensor: tensor)
    frozen = {name.removeprefix("frozen.") for name in manifest["frozen"]}
    keys = {f"{'frozen' if name in frozen else 'master'}.{name}": tensor for name, tensor in views.items()}
    load_tensors(checkpoint, manifest, keys)
    for layer, warmup in manifest["counters"]["reservoir_warmup"].items():
        model.liquids[int(layer)].warmup = warmup
    return model.eval(), manifest, checkpoint


def open_model(path: Path | str, *, device: Literal["auto", "cpu", "cuda"]) -> tuple[LanguageModel, Tokenizer, Path]:
    """A verified checkpoint's model, in bf16 on a GPU and fp32 on a CPU, its tokenizer, and the checkpoint's path."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and no GPU is visible; use --device cpu")
    where, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    model, _, checkpoint = load_model(Path(path), device=where, dtype=dtype)
    return model, Tokenizer.from_file(checkpoint / "tokenizer.json"), checkpoint


def rng_state(device: torch.device) -> dict[str, str]:
    """torch's generators, by device type, as base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(saved: dict[str, str], device: torch.device) -> None:
    """Restore `rng_state()`."""
    states = {n: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for n, text in saved.items()}
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _way_out(checkpoint: Path) -> str:
    return f"restore it, or use another checkpoint and delete {checkpoint.name}"


def io_threads(world_size: int) -> int:
    """Threads by which each of `world_size` ranks reads or writes files; up to eight ranks share a host."""
    return max(1, min(16, (os.cpu_count() or 1) // min(world_size, 8)))


def hash_files(folder: Path, names: Iterable[str], threads: int) -> dict[str, dict[str, Any]]:
    """Size and xxh3-64 of files, several at a time (hashing releases the interpreter lock)."""

    def digest(name: str) -> tuple[str, dict[str, Any]]:
        hasher, size = xxhash.xxh3_64(), 0
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                hasher.update(block)
                size += len(block)
        return name, {"bytes": size, "xxh3_64": hasher.hexdigest()}

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(digest, names))


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-64 of the values of a whole tensor."""
    return xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().numpy().tobytes())


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
