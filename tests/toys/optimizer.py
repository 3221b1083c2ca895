"""A toy optimizer: gradient descent with momentum."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from lfm.training.optimizer.kind import Group, OptimizerKind


class ToyOptimizerConfig(OptimizerKind):
    kind: Literal["toy"] = "toy"
    """Which optimizer."""
    state_title: ClassVar[str] = "momentum"
    state_keys: ClassVar[tuple[str, ...]] = ("momentum",)

    def build(self, groups: Sequence[Group], *, fused: bool = True) -> torch.optim.Optimizer:
        return ToyOptimizer(self._for_torch(groups), {})


class ToyOptimizer(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                state["momentum"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * state["momentum"])
