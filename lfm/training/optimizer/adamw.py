"""AdamW, fused."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from lfm.kernels.adamw import adamw_
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
    waits_for_nothing: ClassVar[bool] = True

    def build(self, groups: Sequence[Group], *, fused: bool = True) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._for_torch(groups), lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)

    @torch.no_grad()
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Tensor,
        scale: Tensor,
        refused: Tensor,
        working: Mapping[Tensor, Tensor],
    ) -> None:
        """On a GPU in one pass over all of it."""
        named = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if not named or not named[0][1].is_cuda:
            super().update(optimizer, lr=lr, scale=scale, refused=refused, working=working)
            return
        states = [optimizer.state[parameter] for _, parameter in named]
        # One for each: of a single tensor older versions of torch ask for the number, which a recording may not.
        torch._foreach_add_([state["step"] for state in states], [1 - refused.float()] * len(states))  # pyright: ignore[reportPrivateImportUsage]
        step = states[0]["step"].double()  # all have seen as many updates
        corrections = [1 / (1 - beta**step) for beta in self.betas]
        rates = {group["lr_multiple"]: lr * group["lr_multiple"] for group in optimizer.param_groups}
        adamw_(
            [parameter for _, parameter in named],
            [parameter.grad for _, parameter in named],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            torch.stack([rates[group["lr_multiple"]] for group, _ in named]).float(),
            torch.stack([*corrections, scale.double(), refused.double()]).float(),
            betas=self.betas,
            eps=self.eps,
            weight_decays=[group["weight_decay"] for group, _ in named],
            workings=[working.get(parameter) for _, parameter in named],
        )

    def first_gradient(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["exp_avg"] / (1 - self.betas[0])
