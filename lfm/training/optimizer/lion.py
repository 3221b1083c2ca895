"""Lion: the sign of a moving average of gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lfm.training.optimizer.kind import Beta, Group, OptimizerKind


class LionConfig(OptimizerKind):
    """Chen et al. 2023, arXiv 2302.06675: half of AdamW's state; rates 3 to 10 times lower, decays as much higher."""

    kind: Literal["lion"] = "lion"
    """Which optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """How much of the moment is in the update's direction, and stays in the moment."""

    state_title: ClassVar[str] = "Lion moment"
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def build(self, groups: Sequence[Group], *, fused: bool = True) -> torch.optim.Optimizer:
        return Lion(self._for_torch(groups), self.betas)

    def first_gradient(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["exp_avg"] / (1 - self.betas[1])


class Lion(torch.optim.Optimizer):
    """Program 1 of the paper.  Takes its state as `OptimizerKind.new_state` makes it."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    (direction, memory), average = group["betas"], state["exp_avg"]
    state["step"] += 1
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(average.lerp(gradient, 1 - direction).sign_(), alpha=-group["lr"])
    average.lerp_(gradient, 1 - memory)
