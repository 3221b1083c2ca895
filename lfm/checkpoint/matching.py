"""Whether a checkpoint is of the model that a config describes."""

from pathlib import Path
from typing import Any

from lfm.checkpoint.manifest import MANIFEST_NAME, way_out
from lfm.errors import UserError
from lfm.models.registry import ModelConfig


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


def check_optimizer(checkpoint: Path, manifest: dict[str, Any], kind: str) -> None:
    """Raises UserError unless the checkpoint holds the state of an optimizer of this kind."""
    stored = manifest["config"].get("optimizer", {}).get("kind", "adamw")
    if stored != kind:
        raise UserError(
            f"checkpoint {checkpoint} has the state of optimizer.kind={stored} and the config says {kind}; set it "
            f"alike, or start a new run from its weights (name=NAME checkpoint.init_from={checkpoint})"
        )


def check_layers(checkpoint: Path, manifest: dict[str, Any], model: ModelConfig) -> None:
    """Raises UserError unless the manifest's counters are of the reservoir layers of `model`."""
    stored = sorted(map(int, manifest["counters"]["reservoir_warmup"]))
    if stored != sorted(model.reservoir_layers):
        raise UserError(
            f"{checkpoint / MANIFEST_NAME} has counters of reservoir layers {stored} and its model has "
            f"{sorted(model.reservoir_layers)}; {way_out(checkpoint)}"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
