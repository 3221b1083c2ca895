"""`--medical` and `--safety-threshold` of commands that answer, over what the run's own configuration says."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lfm.errors import UserError
from lfm.files import shown
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
    """Raises UserError for a threshold that is not between 0 and 1, and for one where the mode is off."""
    from lfm.checkpoint.manifest import read_manifest

    tree = dict(read_manifest(checkpoint, warn=False)["config"].get("medical") or {})
    if flags.medical is not None:
        tree["mode"] = flags.medical
    if flags.safety_threshold is not None:
        tree["safety_threshold"] = flags.safety_threshold
    found = MedicalConfig.from_tree(tree, source="--medical and --safety-threshold")
    if flags.safety_threshold is not None and not found.mode:
        raise UserError(
            f"--safety-threshold {flags.safety_threshold:g} is of medical mode, which is off; add --medical, or leave "
            "it out"
        )
    return found


def check_out(out: Path, folders: Sequence[Path]) -> None:
    """Raise UserError where a file would be written among those that are read."""
    for folder in folders:
        if out.resolve().parent == folder.resolve():
            raise UserError(f"--out {shown(out)} is among the files of {shown(folder)}; give another place")


def check_as_calibrated(**flags: bool) -> None:
    """Raise UserError for flags by which a model answers in another way than when its heads were calibrated."""
    for name, is_set in flags.items():
        if is_set:
            raise UserError(
                f"--{name.replace('_', '-')} changes the model's probabilities, which its heads were calibrated "
                "without; leave it out, or leave medical mode"
            )
