"""Packages of the extras `hf` and `onnx`."""

import importlib
from typing import Any

from lfm.errors import UserError


def require(module: str, *, purpose: str, extra: str = "hf") -> Any:
    """Import an optional package.  Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{purpose} needs the package {package}; install it with `pip install 'lfm-training[{extra}]'`"
        ) from None
