"""Mistakes that run without an error: engines handed to a certificate to prove that it finds them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lfm.kernels.gradient_sum import gradient_sum
from lfm.models.language_model import LanguageModel
from lfm.parallel.megatron import MegatronParts
from lfm.parallel.zero import Weight
from lfm.training.parallel_engine import ParallelEngine


class ExpertAsDense(ParallelEngine):
    """Gradients of experts are averaged over processes that hold other experts."""

    def _weights(self, piece: LanguageModel) -> list[Weight]:
        return [dataclasses.replace(weight, is_expert=False) for weight in super()._weights(piece)]


class _NothingShared(MegatronParts):
    def shared(self, weight: Tensor) -> Tensor:
        return weight


class UnreducedReplicatedWeight(ParallelEngine):
    """Tensor-parallel processes keep the summands of a common weight's gradient to themselves."""

    make_parts = _NothingShared


class DoubledExpertGradient(ParallelEngine):
    """In the first step, the one that is compared; it sends nothing before its passes are over."""

    def _run(self, *arguments: Any, **options: Any) -> None:
        super()._run(*arguments, **options)
        for weight in self.weights:
            total = gradient_sum(weight.parameter)
            is_expert = ".experts." in self.global_parts[weight.name][0].name
            if is_expert and total is not None and self.optimizer_step == 0 and not total.is_empty:
                total.total.mul_(2)


class BalanceOfOwnRows(ParallelEngine):
    """Every process balances its routers by its own rows alone."""

    def _over_all(
        self, largest: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = {name: sums[name].cpu() for name in ("expert_load", "router_logits") if name in sums}
        largest, sums = super()._over_all(largest, sums)
        return largest, sums | own


FAULTS: dict[str, type[ParallelEngine]] = {
    "expert_as_dense": ExpertAsDense,
    "unreduced_replicated_weight": UnreducedReplicatedWeight,
    "doubled_expert_gradient": DoubledExpertGradient,
    "balance_of_own_rows": BalanceOfOwnRows,
}
