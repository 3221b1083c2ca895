"""The factor on the loss that keeps float16 gradients representable (Micikevicius et al. 2018, arXiv 1710.03740)."""

import math
from collections.abc import Mapping
from typing import Any

from lfm.errors import NonFiniteError

GROW_AFTER_UPDATES = 2000
"""Updates in a row without an overflow, after which the factor doubles; each overflow halves it."""


class LossScale:
    """`value` multiplies the loss, and divides gradients before they are used; an update whose gradients overflowed is
    skipped and counted.  Powers of two, so that it rounds nothing."""

    def __init__(self, value: float) -> None:
        self.value, self.calm_updates, self.skipped_updates = value, 0, 0

    def after(self, norm: float) -> bool:
        """Take the norm of an update's gradients; whether the update is to be made.

        Raises NonFiniteError where gradients overflow without a factor too.
        """
        if math.isfinite(norm):
            self.calm_updates += 1
            if self.calm_updates == GROW_AFTER_UPDATES:
                self.value, self.calm_updates = self.value * 2, 0
            return True
        if self.value <= 1:
            raise NonFiniteError(f"gradient norm is {norm} at a loss scale of {self.value:g}: lower optimizer.lr")
        self.value, self.calm_updates = self.value / 2, 0
        self.skipped_updates += 1
        return False

    def record(self) -> dict[str, Any]:
        return {"loss_scale": self.value, "skipped_updates": self.skipped_updates}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"loss_scale": self.value, "calm_updates": self.calm_updates, "skipped_updates": self.skipped_updates}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`; one of a run in another dtype has none, and leaves it as at a start."""
        if state.get("loss_scale") is not None:
            self.value = state["loss_scale"]
            self.calm_updates, self.skipped_updates = state["calm_updates"], state["skipped_updates"]
