"""`--medical` and `--safety-threshold` of commands that answer, over what the run's own configuration says."""

import argparse
from pathlib import Path

from lfm.medical.config import MedicalConfig


def add_medical_flags(parser: argparse.ArgumentParser) -> None:
    helps = {name: " ".join((field.description or "").split()) for name, field in MedicalConfig.model_fields.items()}
    parser.add_argument(
        "--medical",
        action=argparse.BooleanOptionalAction,
        help=f"{helps['mode']}  (default: medical.mode of the run's configuration)",
    )
    parser.add_argument("--safety-threshold", type=float, metavar="P", help=helps["safety_threshold"])


def medical_of(flags: argparse.Namespace, checkpoint: Path) -> MedicalConfig:
    """Raises UserError for a threshold that is not between 0 and 1."""
    from lfm.checkpoint.manifest import read_manifest

    tree = dict(read_manifest(checkpoint, warn=False)["config"].get("medical") or {})
    if flags.medical is not None:
        tree["mode"] = flags.medical
    if flags.safety_threshold is not None:
        tree["safety_threshold"] = flags.safety_threshold
    return MedicalConfig.from_tree(tree, source="--medical and --safety-threshold")
