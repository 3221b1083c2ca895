"""safetensors files: what is in one, and writing one."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfm.errors import UserError
from lfm.export.packages import require
from lfm.files import open_file, reason, shown, sync


def holdings(file: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors, and the metadata, of a safetensors file.  Raises UserError for one that is none."""
    safetensors = require("safetensors", purpose=f"reading {shown(file)}")
    open_file(file).close()
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            return list(opened.keys()), dict(opened.metadata() or {})
    except Exception as error:  # of the Rust side
        raise UserError(f"{shown(file)} is no safetensors file ({reason(error)}); give another") from None


def save(tensors: Mapping[str, Tensor], file: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, to the disk, that those may read who may read its folder.  Raises UserError where it cannot."""
    safetensors = require("safetensors", purpose=f"writing {shown(file)}")
    save_file = require("safetensors.torch", purpose=f"writing {shown(file)}").save_file
    try:
        save_file(dict(tensors), str(file), metadata={"format": "pt", **(metadata or {})})
    except safetensors.SafetensorError as error:  # what the system refuses, too
        raise UserError(
            f"{shown(file)} cannot be written ({reason(error)}); make room there, or give another --out"
        ) from None
    os.chmod(file, file.parent.stat().st_mode & 0o666)  # the package makes it its owner's alone
    sync(file)
