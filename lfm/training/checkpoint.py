"""Checkpoints: torch.distributed.checkpoint with global names, never half-written, always verified.

    checkpoints/step_00000100/
        *.distcp, .metadata     tensors `master.* exp_avg.* exp_avg_sq.* frozen.*`, one global tensor a name
        tokenizer.json          so that a checkpoint generates text on its own
        manifest.json           step, resolved config, counters, RNG; size and xxh3-64 of every file above

A checkpoint is written under a temporary name, synced, given its manifest, and renamed: a folder called `step_*` is
whole or was damaged later, which the hashes find.
"""

import base64
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lfm.config import Config
from lfm.errors import UserError
from lfm.files import sync, write_durably
from lfm.models.global_names import global_views
from lfm.models.lfm import LFM, LFMConfig
from lfm.training.engine import materialize

FORMAT = 1
_TEMPORARY = ".writing-"
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointConfig(Config):
    every_steps: NonNegativeInt = 1000
    """0: only at the end and on a signal."""
    save_at_end: bool = True
    keep: PositiveInt = 2
    """Newest checkpoints kept; older ones are removed after a newer one is whole."""
    resume: str = "auto"
    """auto: go on from the run's newest checkpoint, if any; never: refuse a run folder that has one; or a path."""
    init_from: str | None = None
    """Run or checkpoint whose weights alone start this run (continued pre-training); optimizer and data start anew."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], manifest: dict[str, Any], *, keep: int, tokenizer: bytes
) -> Path:
    """Write `folder/step_N` and drop all but the newest `keep` checkpoints.

    Raises UserError, with every earlier checkpoint intact, when the disk is full.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f"{_TEMPORARY}step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    need, free = sum(t.numel() * t.element_size() for t in tensors.values()), shutil.disk_usage(folder).free
    if need > free:
        raise _disk_full(final, need, free)
    try:
        writer = FileSystemWriter(temporary, thread_count=_threads(), sync_files=True)
        with _one_process():
            dcp_save(dict(tensors), storage_writer=writer, no_dist=True)
        write_durably(temporary / "tokenizer.json", tokenizer)
        manifest = {
            "format": FORMAT,
            "step": step,
            **manifest,
            "frozen": {name: _tensor_hash(t) for name, t in tensors.items() if name.startswith("frozen.")},
            "files": _hash_files(temporary),
        }
        write_durably(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_out_of_space(error):
            raise _disk_full(final, need, shutil.disk_usage(folder).free) from error
        raise
    os.rename(temporary, final)
    sync(folder)
    for old in whole_checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first.  Unfinished ones, and copies under other names, are not seen."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def set_newer_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `abandoned_*`: a run that goes on from `step` leaves their branch."""
    for path in whole_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            print(f"{path.name} is now {aside.name}: this run goes on from step {step}", flush=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a crash left half-written or half-removed."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of the run folder it names."""
    path = path.expanduser()
    if (path / "manifest.json").exists() or path.name.startswith("step_"):
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


def verify(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError, naming the file, unless every file has the size and hash of the manifest."""
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        if not file.exists():
            raise UserError(f"checkpoint file {file} is missing; {_way_out(checkpoint)}")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"checkpoint file {file} has {file.stat().st_size} bytes instead of {entry['bytes']}; "
                f"{_way_out(checkpoint)}"
            )
    for name, entry in _hash_files(checkpoint, list(manifest["files"])).items():
        if entry != manifest["files"][name]:
            raise UserError(f"checkpoint file {checkpoint / name} is corrupt (hash differs); {_way_out(checkpoint)}")


def check_architecture(checkpoint: Path, manifest: dict[str, Any], model: LFMConfig) -> None:
    """Raises UserError, naming the first key that differs, unless `model` has the tensors of the checkpoint."""
    stored, wanted = _flatten(manifest["config"]["model"]), _flatten(model.model_dump(mode="json"))
    for key in sorted(stored.keys() | wanted.keys()):
        if key not in _MAY_DIFFER and stored.get(key) != wanted.get(key):
            raise UserError(
                f"checkpoint {checkpoint} is of another architecture: model.{key} is {stored.get(key)!r} there and "
                f"{wanted.get(key)!r} in the config; set it alike, or start a new run (name=NAME)"
            )


# What a run may change on the way: numbers that no tensor's shape or meaning depends on.
_MAY_DIFFER = {
    *("seq_length", "attention_backend", "moe_capacity_factor", "moe_aux_loss_coeff", "moe_aux_loss_scope"),
    *("moe_z_loss_coeff", "liquid.backend", "liquid.chunk_length", "liquid.warmup", "liquid.tolerance"),
}


def load_tensors(checkpoint: Path, manifest: dict[str, Any], targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (key -> tensor, any dtype and device) in place; frozen ones are checked against their hashes."""
    missing = targets.keys() - FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys()
    if missing:
        raise UserError(f"checkpoint {checkpoint} lacks {sorted(missing)[0]} (and {len(missing) - 1} more)")
    with _one_process():
        dcp_load(dict(targets), checkpoint_id=checkpoint, no_dist=True)
    for name, expected in manifest["frozen"].items():
        if name in targets and targets[name].dtype in (torch.float32, torch.bool):
            if _tensor_hash(targets[name]) != expected:
                raise UserError(f"frozen tensor {name} of {checkpoint} does not match its hash; {_way_out(checkpoint)}")


def load_model(path: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[LFM, dict[str, Any], Path]:
    """A verified checkpoint's model in evaluation mode, its manifest, and the checkpoint's path."""
    checkpoint = find(path)
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    config = LFMConfig.from_tree(manifest["config"]["model"], source=str(checkpoint / "manifest.json"))
    model = materialize(config, device=device, dtype=dtype)
    views = global_views(model, lambda _, tensor: tensor)
    frozen = {name.removeprefix("frozen.") for name in manifest["frozen"]}
    keys = {f"{'frozen' if name in frozen else 'master'}.{name}": tensor for name, tensor in views.items()}
    load_tensors(checkpoint, manifest, keys)
    for layer, warmup in manifest["counters"]["reservoir_warmup"].items():
        model.liquids[int(layer)].warmup = warmup
    return model.eval(), manifest, checkpoint


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


@contextmanager
def _one_process() -> Iterator[None]:
    """Without DCP's warning that it assumes what `no_dist=True` says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _way_out(checkpoint: Path) -> str:
    return f"restore it, or use another checkpoint and delete {checkpoint.name}"


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether an out-of-space OSError is anywhere behind `error`, also inside DCP's wrapper with its own list."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OUT_OF_SPACE:
            return True
        wrapped: Any = getattr(error, "failures", {})
        if any(_is_out_of_space(item[0]) for item in wrapped.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(final: Path, need: int, free: int) -> UserError:
    return UserError(
        f"checkpoint {final} needs {need / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free; "
        "free some space or set output=DIR; earlier checkpoints are intact"
    )


def _hash_files(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and xxh3-64 of files, several at a time (hashing releases the interpreter lock)."""
    names = names or sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")

    def digest(name: str) -> dict[str, Any]:
        hasher, size = xxhash.xxh3_64(), 0
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                hasher.update(block)
                size += len(block)
        return {"bytes": size, "xxh3_64": hasher.hexdigest()}

    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _tensor_hash(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().numpy().tobytes())


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _remove(checkpoint: Path) -> None:
    """Delete under a name that is not taken for a checkpoint, should the process die half-way."""
    doomed = checkpoint.with_name(f"{_TEMPORARY}old_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
