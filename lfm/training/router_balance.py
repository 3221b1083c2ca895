"""What balances routers between steps, by load and logits of the whole batch, and says where it does not succeed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.backend import widest
from lfm.layers.router import LOGIT_GRID, MEAN_GRID, Balance, BiasBalance
from lfm.talk import complain
from lfm.training.guards import Masters

DEAD_AFTER_STEPS = 100
"""An expert without a token for so many steps counts as dead."""
UNEVEN_ABOVE = 2.0
"""Load of the fullest expert over the mean of its layer; less where so much is not possible, see `uneven_above`."""
UNEVEN_STEPS_TO_WARN = 100


def uneven_above(num_experts: int, top_k: int) -> float:
    """Where a load counts as uneven: half of what is possible over the mean, num_experts / top_k, at most 2."""
    return min(UNEVEN_ABOVE, 1 + 0.5 * (num_experts / top_k - 1))


class RouterBalance:
    """Moves the buffers of `lfm.layers.router.Balance` after each update, and counts steps without tokens or balance.

    `balances`: those of this process, by layer.  All processes count alike, for all layers of the model; of those that
    hold the same layers, the one that `speaks` warns.  A step that is refused moves and counts nothing.
    """

    def __init__(self, config: Any, balances: Mapping[int, Balance], *, speaks: bool = True) -> None:
        moe = getattr(config, "moe", None)
        self.moe, self.balances, self.speaks = moe, balances, speaks
        layers = range(config.num_layers) if moe is not None else ()
        num_experts = moe.num_moe_experts if moe is not None else 0
        self.idle_steps: dict[int, list[int]] = {layer: [0] * num_experts for layer in layers}
        """Since each expert had a token."""
        self.uneven_steps: dict[int, int] = dict.fromkeys(layers, 0)
        """Since the load was even enough."""
        self._measured: Mapping[str, Mapping[int, Any]] = {}

    def after_backward(self, measured: Mapping[str, Mapping[int, Any]]) -> None:
        self._measured = measured

    def after_update(self, update: int, masters: Masters) -> bool:
        load, logits = (self._measured.get(name, {}) for name in ("expert_load", "router_logits"))
        self._measured = {}
        for layer, counts in load.items():
            self._count(update, layer, counts)
        if load:
            self._move(load, logits)
        return False

    def record(self) -> dict[str, Any]:
        if self.moe is None:
            return {}
        dead = {str(i): sum(steps >= DEAD_AFTER_STEPS for steps in idle) for i, idle in self.idle_steps.items()}
        return {"dead_experts": dead}

    def state(self) -> dict[str, Any]:
        if self.moe is None:
            return {}
        return {
            "router_idle_steps": {str(layer): list(steps) for layer, steps in self.idle_steps.items()},
            "router_uneven_steps": {str(layer): steps for layer, steps in self.uneven_steps.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        for layer in self.idle_steps:
            self.idle_steps[layer] = list(state["router_idle_steps"][str(layer)])
            self.uneven_steps[layer] = state["router_uneven_steps"][str(layer)]

    def _count(self, update: int, layer: int, counts: Sequence[int]) -> None:
        idle = self.idle_steps[layer]
        self.idle_steps[layer] = [0 if count else steps + 1 for count, steps in zip(counts, idle, strict=True)]
        uneven = max(counts) * len(counts) / max(1, sum(counts))
        self.uneven_steps[layer] = self.uneven_steps[layer] + 1 if uneven > self._above else 0
        if self.uneven_steps[layer] == UNEVEN_STEPS_TO_WARN and self.speaks and layer in self.balances:
            complain(
                f"update {update}: for {UNEVEN_STEPS_TO_WARN} steps one expert of layer {layer} has had more than "
                f"{self._above:g} times the mean load of the layer's experts (now {uneven:.2f}); {self._way_out()}"
            )

    @property
    def _above(self) -> float:
        assert self.moe is not None
        return uneven_above(self.moe.num_moe_experts, self.moe.moe_router_topk)

    def _way_out(self) -> str:
        assert self.moe is not None
        balance = self.moe.balance
        if isinstance(balance, BiasBalance):
            return f"raise model.ffn.balance.update_rate (now {balance.update_rate:g})"
        return f"set model.ffn.balance.kind=bias, or raise model.ffn.balance.coeff (now {balance.coeff:g})"

    @torch.no_grad()
    def _move(self, load: Mapping[int, Sequence[int]], logits: Mapping[int, Sequence[int]]) -> None:
        """From whole numbers alone, so that all processes of all layouts come to the same."""
        assert self.moe is not None
        config, here = self.moe.balance, list(self.balances)
        balances = [self.balances[layer] for layer in here]
        totals = [max(1, sum(load[layer])) for layer in here]

        def each(tensor: Tensor, like: Tensor) -> list[Tensor]:
            return list(tensor.to(like.device, non_blocking=True).unbind())

        if not here:
            return
        if balances[0].has_shares:
            shares = torch.tensor([[n / total for n in load[i]] for i, total in zip(here, totals, strict=True)])
            found = [balance.shares for balance in balances]
            torch._foreach_copy_(found, each(shares, found[0]))  # pyright: ignore[reportPrivateImportUsage]
        if not isinstance(config, BiasBalance):
            return
        signs = torch.tensor([[_sign(sum(load[i]) - n * len(load[i])) for n in load[i]] for i in here])
        drifts = [balance.drift for balance in balances]
        torch._foreach_add_(drifts, each(signs * config.update_rate, drifts[0]))  # pyright: ignore[reportPrivateImportUsage]
        if config.mean_decay is None:
            return
        # Choices are as many as tokens times the experts of each.
        per_token = [total / self.moe.moe_router_topk / LOGIT_GRID for total in totals]
        means = [[n / tokens for n in logits[i]] for i, tokens in zip(here, per_token, strict=True)]
        found = [balance.mean for balance in balances]
        device, wide = found[0].device, widest(found[0].device)
        step = torch.tensor(means, dtype=wide) * (1 - config.mean_decay)
        moved = torch.stack(found).to(wide) * config.mean_decay + step.to(device, non_blocking=True)
        rounded = (moved / MEAN_GRID).round() * MEAN_GRID
        torch._foreach_copy_(found, list(rounded.unbind()))  # pyright: ignore[reportPrivateImportUsage]


def _sign(number: int) -> float:
    return float((number > 0) - (number < 0))
