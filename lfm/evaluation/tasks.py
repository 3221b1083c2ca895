"""Tasks of lm-evaluation-harness, where it is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfm.errors import UserError

if TYPE_CHECKING:
    from lfm.evaluation.harness import Tasks


def open_tasks(wanted: Sequence[str], folders: Sequence[Path] = ()) -> "Tasks":
    """As `lfm.evaluation.harness.open_tasks`.  Raises UserError where the harness is not installed, too."""
    try:
        from lfm.evaluation import harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"tasks need lm-evaluation-harness ({error.name} is missing): pip install 'lfm-training[lm-eval]'"
        ) from None
    return harness.open_tasks(wanted, folders)
