"""Learning-rate schedules: a pure function of the step, so that resuming needs nothing but the step."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lfm.config import Config, CountOrZero

Fraction = Annotated[float, Field(ge=0, le=1)]

ONE_CYCLE_START_RATIO = 1 / 25


class ScheduleConfig(Config):
    alternatives = (("warmup_steps", "warmup_fraction"), ("hold_steps", "hold_fraction"))
    kind: Literal["cosine", "linear", "wsd", "constant", "one_cycle"] = "cosine"
    """After the warm-up: cosine decay; linear decay; stable then linear decay (warm-up, stable, decay); constant.
    one_cycle: cosine up from 1/25 of the peak, cosine down to min_lr_ratio (Smith & Topin 2018, arXiv 1708.07120)."""
    warmup_steps: CountOrZero = 2000
    warmup_fraction: Fraction | None = None
    """Share of all steps, at least one step, in place of warmup_steps."""
    hold_steps: CountOrZero = 0
    """cosine and linear: steps at the peak between warm-up and decay."""
    hold_fraction: Fraction | None = None
    """Share of all steps, in place of hold_steps."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate over the peak."""
    decay_fraction: Fraction = 0.2
    """wsd: share of all steps spent in the final decay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and self.decay_fraction == 0:
            raise ValueError("decay_fraction=0 makes wsd a constant schedule; use kind: constant")
        if (self.hold_steps or self.hold_fraction) and self.kind not in ("cosine", "linear"):
            raise ValueError(
                f"hold_steps={self.hold_steps}, hold_fraction={self.hold_fraction} need kind cosine or linear"
            )
        return self


def warmup_of(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of the warm-up."""
    fraction = config.warmup_fraction
    return config.warmup_steps if fraction is None else max(1, int(fraction * total_steps))


def highest_factor(config: ScheduleConfig, total_steps: int) -> float:
    """Of `lr_factor` over a run: 1 at the end of the warm-up, if there is one and the run reaches it."""
    end_of_warmup = min(max(1, warmup_of(config, total_steps)), total_steps)
    return lr_factor(config, end_of_warmup - 1, total_steps)


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate for update `step` (0-based) of `total_steps`."""
    c, warmup = config, warmup_of(config, total_steps)
    if c.kind == "one_cycle":
        return _one_cycle(step, total_steps, warmup, c.min_lr_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if c.kind == "constant":
        return 1.0
    if c.kind == "wsd":
        start = max(warmup, round(total_steps * (1 - c.decay_fraction)))
    else:
        start = warmup + (c.hold_steps if c.hold_fraction is None else int(c.hold_fraction * total_steps))
    if step < start:
        return 1.0
    progress = min(1.0, (step + 1 - start) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if c.kind == "cosine" else 1 - progress
    return c.min_lr_ratio + (1 - c.min_lr_ratio) * shape


def _one_cycle(step: int, total_steps: int, warmup: int, end: float) -> float:
    # The peak is reached at step warmup - 1, the end at the last step.
    top = max(0, warmup - 1)
    if step <= top:
        low, high, progress = ONE_CYCLE_START_RATIO, 1.0, step / max(1, top)
    else:
        low, high, progress = 1.0, end, min(1.0, (step - top) / max(1, total_steps - 1 - top))
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * progress))
