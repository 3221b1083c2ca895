"""Packages that only some preparations need."""

import importlib
import importlib.util
from types import ModuleType

from lfm.errors import UserError


def has(module: str) -> bool:
    """Whether an optional package is installed."""
    return importlib.util.find_spec(module) is not None


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.  Raises UserError with the command that installs it; `purpose` names the key."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{purpose} needs the package {package}; install it with `pip install 'lfm-training[{extra}]'`"
        ) from None
