"""How tokens reach experts that other processes hold: each expert cut by width, or whole experts spread."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.permutation import combine, dispatch, sorted_places
from lfm.layers.parts import Parts, TokenDispatcher
from lfm.parallel.exchange import Counts, exchange
from lfm.parallel.groups import Groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel import mappings


class CutByWidth(TokenDispatcher):
    """Each tensor-parallel process has a slice of every expert's width and computes it for the whole rows."""

    def __init__(self, num_experts: int, parts: Parts) -> None:
        super().__init__(num_experts)
        self.parts, self.width_parts = parts, parts.tensor_size

    def prepare(self, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Outputs are summands, so each process sees a summand of the routing weights' gradient.
        return self.parts.whole_sequence(x, partial_gradients=True), experts, self.parts.shared(weights)

    def finish(self, y: Tensor) -> Tensor:
        own = mappings.reduce_scatter_to_sequence_parallel_region(y.flatten(0, 1), group=self.parts.tensor_group)
        return own.unflatten(0, (len(y), -1))


class AllToAll(TokenDispatcher):
    """Experts are divided over the expert group; rows travel to their expert and back, routing weights stay at home.

    Rows arrive grouped by source and, within it, by expert.  Rows are exchanged rather than weighted expert outputs,
    so that a token's sum is formed in the plain model's order.
    """

    def __init__(self, num_experts: int, groups: Groups) -> None:
        super().__init__(num_experts)
        self.group = groups.expert
        self.tensor_rank = groups.tensor.rank()
        self.count = num_experts // groups.layout.expert
        self.first = self.group.rank() * self.count

    def prepare(self, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[:2].numel()
        own = slice(self.tensor_rank * n, (self.tensor_rank + 1) * n)
        return x, experts[own], weights[own]

    def announce(self, load: Tensor) -> Counts:
        return Counts(load.view(-1, self.count), self.group)

    def run(self, inputs: Tensor, load: Tensor, announced: Counts, compute: Any) -> Tensor:
        to_each, from_each = announced.read()
        kept, num_arriving = sum(to_each), sum(from_each)
        rows = exchange(inputs[:kept], from_each, to_each, self.group)
        experts = torch.arange(self.count, device=load.device).repeat(len(from_each))
        experts = experts.repeat_interleave(announced.arriving.flatten(), output_size=num_arriving)
        place = sorted_places(experts, self.count)[:, None]
        rows = compute(dispatch(rows, place), announced.arriving.sum(0))
        rows = exchange(combine(rows, place), to_each, from_each, self.group)
        dropped = len(inputs) - kept
        return torch.cat([rows, rows.new_zeros(dropped, rows.shape[1])]) if dropped else rows
