"""Weights from outside, by global name, as a run folder whose checkpoint every command takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.checkpoint.manifest import TOKENIZER_NAME
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import not_finite
from lfm.data.tokenizer import Tokenizer
from lfm.errors import NonFiniteError, UserError
from lfm.export.packages import require
from lfm.export.source import Expected, expected_tensors
from lfm.files import shown
from lfm.models.registry import FAMILIES, ModelConfig, parse

NO_CHAIN = "0" * 32
"""Of the digests of what a run read, which an import does not know."""
_WAY_OUT = "give weights and configuration of one model, as `lfm export` writes them"


@dataclass(frozen=True)
class Incoming:
    """A model that some format holds; nothing is checked yet."""

    place: Path
    """What was read, for what is said of it."""
    tree: Mapping[str, Any]
    """Keys of the model's configuration with its `kind`; keys that its family does not have are left out."""
    files: Mapping[str, Path]
    """Tensor by global name -> the safetensors file that holds it."""
    tokenizer: bytes | None = None
    """A tokenizer.json."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """As `Source.record`, or nothing."""

    def config(self) -> ModelConfig:
        """Raises UserError where the keys are none of a family's."""
        kind = self.tree.get("kind")
        known = {family.model_fields["kind"].default: family for family in FAMILIES}
        if not isinstance(kind, str) or kind not in known:
            raise UserError(
                f"{shown(self.place)} is of kind {kind!r}, which is no family of this project; it has "
                f"{', '.join(known)}, as `lfm export` writes them"
            )
        own = {key: value for key, value in self.tree.items() if key in known[kind].model_fields}
        return parse(own, source=shown(self.place))


def write_run(incoming: Incoming, folder: Path, *, name: str, tokenizer: bytes | None = None) -> Path:
    """Write `folder/checkpoints/step_N`, the one checkpoint of a run of this name; returns its path.

    `tokenizer` takes the place of the incoming one.  Raises UserError, before anything is written, where names, shapes
    or dtypes are not those of the model that the configuration describes, or there is no tokenizer; NonFiniteError for
    a number that is none.
    """
    config = incoming.config()
    _check_count(incoming, config)
    wanted = expected_tensors(config)
    _check_names(incoming, wanted)
    definition = _checked_tokenizer(incoming, tokenizer, config)
    tensors = {f"{of.kind}.{name}": tensor for name, of, tensor in _tensors(incoming, wanted)}
    bad = not_finite(tensors)
    if bad is not None:
        raise NonFiniteError(f"{shown(incoming.place)}: {bad.partition('.')[2]} is not finite; use other weights")
    step = _count(incoming.record, "step")
    manifest = {
        "config": {"name": name, "model": config.model_dump(mode="json"), "optimizer": {"kind": "none"}},
        "progress": {
            **{"step": step, "tokens": _count(incoming.record, "tokens"), "best_validation": None},
            **{"validations_without_gain": 0, "chain": NO_CHAIN, "skips": []},
        },
        "counters": _counters(config, step),
        "data": {"position": 0, "seed": 0, "data_checksum": "none"},
    }
    saver = Saver(folder / "checkpoints", keep=1, asynchronous=False)
    saver.save(step, tensors, manifest, definition)
    return folder / "checkpoints" / f"step_{step:08d}"


def _check_count(incoming: Incoming, config: Any) -> None:
    """A model is laid out part by part to know its tensors: for a million experts that takes minutes.

    Each layer has a tensor at least, and each expert.
    """
    moe = getattr(config, "moe", None)
    experts = 1 if moe is None else moe.num_moe_experts
    if len(incoming.files) < config.num_layers * experts:
        of_each = f" of {experts:,} experts" if experts > 1 else ""
        raise UserError(
            f"{shown(incoming.place)} has {len(incoming.files):,} tensors, too few for the {config.num_layers:,} "
            f"layers{of_each} that its configuration describes; {_WAY_OUT}"
        )


def _check_names(incoming: Incoming, wanted: Mapping[str, Expected]) -> None:
    missing = sorted(wanted.keys() - incoming.files.keys())
    unknown = sorted(incoming.files.keys() - wanted.keys())
    if missing:
        raise UserError(
            f"{shown(incoming.place)} lacks the tensor {missing[0]} (and {len(missing) - 1} more) that its "
            f"configuration describes; {_WAY_OUT}"
        )
    if unknown:
        raise UserError(
            f"{shown(incoming.place)} has a tensor {shown(unknown[0])} (and {len(unknown) - 1} more) that is none of "
            f"its configuration's; {_WAY_OUT}"
        )


def _tensors(incoming: Incoming, wanted: Mapping[str, Expected]) -> list[tuple[str, Expected, Tensor]]:
    """Name, what is expected and the tensor; all shapes are looked at before any tensor is read."""
    safetensors, found = require("safetensors", purpose=f"reading {shown(incoming.place)}"), []
    by_file: dict[Path, list[str]] = {}
    for name, file in incoming.files.items():
        by_file.setdefault(file, []).append(name)
    for only_look in (True, False):
        for file, names in by_file.items():
            with safetensors.safe_open(str(file), framework="pt") as opened:
                for name in names:
                    if only_look:
                        _check_shape(incoming.place, name, opened.get_slice(name), wanted[name].tensor)
                    else:
                        tensor = opened.get_tensor(name).to(wanted[name].tensor.dtype)
                        found.append((name, wanted[name], tensor))
    return found


_FLOATING = ("F64", "F32", "F16", "BF16")


def _check_shape(place: Path, name: str, found: Any, wanted: Tensor) -> None:
    shape, dtype = list(found.get_shape()), found.get_dtype()
    if shape != list(wanted.shape):
        raise UserError(
            f"{name} of {shown(place)} has shape {shape}, and its configuration describes {list(wanted.shape)}; give "
            "weights and configuration of one model"
        )
    own = {torch.bool: ("BOOL",), torch.int32: ("I32",)}.get(wanted.dtype, _FLOATING)
    if dtype not in own:
        raise UserError(f"{name} of {shown(place)} is of dtype {dtype}, not {' or '.join(own)}; give other weights")


def _checked_tokenizer(incoming: Incoming, given: bytes | None, config: ModelConfig) -> bytes:
    definition = given if given is not None else incoming.tokenizer
    if definition is None:
        raise UserError(f"{shown(incoming.place)} has no {TOKENIZER_NAME}; give one with --tokenizer FILE")
    tokenizer = Tokenizer(definition, source=f"the tokenizer of {shown(incoming.place)}")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {shown(incoming.place)} has {tokenizer.vocab_size} ids and the model "
            f"{config.vocab_size}; give the model's own with --tokenizer FILE"
        )
    return definition


def _counters(config: Any, step: int) -> dict[str, Any]:
    """As at the beginning of a run: nothing was watched here yet."""
    layers = [str(layer) for layer in config.reservoir_layers]
    counters: dict[str, Any] = {
        "optimizer_step": step,
        "reservoir_warmup": dict.fromkeys(layers, config.reservoir_warmup),
        "reservoir_calm_steps": dict.fromkeys(layers, 0),
    }
    moe = getattr(config, "moe", None)
    if moe is not None:
        routers = [str(layer) for layer in range(config.num_layers)]
        counters["router_idle_steps"] = {layer: [0] * moe.num_moe_experts for layer in routers}
        counters["router_uneven_steps"] = dict.fromkeys(routers, 0)
    return counters


def _count(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key, 0)
    return value if type(value) is int and 0 <= value < 2**63 else 0
