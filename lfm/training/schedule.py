"""Learning-rate schedules: a pure function of the step, so that resuming needs nothing but the step."""

import math
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator
from typing_extensions import Self

from lfm.config import Config


class ScheduleConfig(Config):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay; stable then linear decay (warm-up, stable, decay); or constant."""
    warmup_steps: NonNegativeInt = 2000
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate over the peak."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """wsd: share of all steps spent in the final decay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and self.decay_fraction == 0:
            raise ValueError("decay_fraction=0 makes wsd a constant schedule; use kind: constant")
        return self


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate for update `step` (0-based) of `total_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    start = config.warmup_steps if config.kind == "cosine" else round(total_steps * (1 - config.decay_fraction))
    start = max(start, config.warmup_steps)
    if step < start:
        return 1.0
    progress = min(1.0, (step + 1 - start) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
