"""AdamW, fused."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat

from lfm.training.optimizer.kind import Beta, Group, OptimizerKind


class AdamWConfig(OptimizerKind):
    """Loshchilov & Hutter 2019, arXiv 1711.05101."""

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment's running means."""
    eps: PositiveFloat = 1e-8

    state_title: ClassVar[str] = "AdamW moments"
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def build(self, groups: Sequence[Group], *, fused: bool = True) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._for_torch(groups), lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
