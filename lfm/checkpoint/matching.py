"""Whether a checkpoint is of the model that a config describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfm.checkpoint.manifest import MANIFEST_NAME, way_out
from lfm.errors import UserError
from lfm.models.registry import ModelConfig


def check_architecture(
    checkpoint: Path,
    manifest: dict[str, Any],
    model: ModelConfig,
    *,
    way_out: str,
) -> None:
    """Raises UserError, naming the first key that differs, unless `model` has the tensors of the checkpoint."""
    stored, wanted = manifest["config"]["model"], model.model_dump(mode="json")
    if stored["kind"] != wanted["kind"]:
        raise UserError(
            f"checkpoint {checkpoint} is of family {stored['kind']} and the config of family {wanted['kind']}; "
            f"give a checkpoint of the same family, or {way_out}"
        )
    for key, there, here in _differences(stored, wanted):
        if key not in model.changeable:
            raise UserError(
                f"checkpoint {checkpoint} is of another architecture: model.{key} is {_said(there)} there and "
                f"{_said(here)} in the config; set it alike, or {way_out}"
            )


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values; of sections of two kinds the kind alone, and the section where one side has none.

    First those that decide over others, and last the one that follows from others where it is not set.
    """
    rank = {"kind": 0, "initialization": 0, "embedding_multiplier": 2}
    for key in sorted(stored.keys() | wanted.keys(), key=lambda key: (rank.get(key, 1), key)):
        there, here = stored.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            if there.get("kind") != here.get("kind"):
                yield f"{prefix}{key}.kind", there.get("kind"), here.get("kind")
            else:
                yield from _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            yield f"{prefix}{key}", there, here


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "set" if "kind" not in value else f"of kind {value['kind']}"
    return "null" if value is None else repr(value)


def check_optimizer(checkpoint: Path, manifest: dict[str, Any], kind: str) -> None:
    """Raises UserError unless the checkpoint holds the state of an optimizer of this kind."""
    stored = manifest["config"].get("optimizer", {}).get("kind", "adamw")
    if stored == "none":
        raise UserError(
            f"checkpoint {checkpoint} was imported and has weights alone, no optimizer's state to go on with; start a "
            f"new run from them (name=NAME checkpoint.init_from={checkpoint})"
        )
    if stored != kind:
        raise UserError(
            f"checkpoint {checkpoint} has the state of optimizer.kind={stored} and the config says {kind}; set it "
            f"alike, or start a new run from its weights (name=NAME checkpoint.init_from={checkpoint})"
        )


def check_layers(checkpoint: Path, manifest: dict[str, Any], model: ModelConfig) -> None:
    """Raises UserError unless the manifest's counters are of the reservoir layers and routers of `model`."""
    stored = sorted(map(int, manifest["counters"]["reservoir_warmup"]))
    if stored != sorted(model.reservoir_layers):
        raise UserError(
            f"{checkpoint / MANIFEST_NAME} has counters of reservoir layers {stored} and its model has "
            f"{sorted(model.reservoir_layers)}; {way_out(checkpoint)}"
        )
    moe = getattr(model, "moe", None)
    wanted = {str(layer): moe.num_moe_experts for layer in range(model.num_layers)} if moe is not None else {}
    idle = manifest["counters"].get("router_idle_steps", {})
    if {layer: len(steps) for layer, steps in idle.items()} != wanted:
        has = f"{len(wanted)} layers of {moe.num_moe_experts} experts" if moe is not None else "no routers"
        raise UserError(
            f"{checkpoint / MANIFEST_NAME} has router counters that are not of its model, which has {has}; "
            f"{way_out(checkpoint)}"
        )
