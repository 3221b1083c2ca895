"""Top-k mixture of SwiGLU experts."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from lfm.config import Config, Width
from lfm.kernels.grouped_linear import grouped_linear
from lfm.kernels.permutation import combine, dispatch, sorted_places
from lfm.kernels.router import router_logits
from lfm.kernels.swiglu import swiglu
from lfm.layers.cost import Cost, matrices
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.router import Balance, BalanceConfig, BalanceScope, BiasBalance, Routing, route, sampled
from lfm.layers.stored import Stored


def count(values: Int[Tensor, " m"], num: int) -> Int[Tensor, " num"]:
    """How often each of `0..num` occurs, without waiting for the device; `num` itself may occur and is not counted."""
    ones = torch.ones_like(values)
    return torch.zeros(num + 1, dtype=values.dtype, device=values.device).scatter_add_(0, values, ones)[:num]


class MoEConfig(Config):
    moved: ClassVar[dict[str, str]] = {"moe_aux_loss_coeff": "balance.coeff", "moe_aux_loss_scope": "balance.scope"}
    kind: Literal["moe"] = "moe"
    """A mixture of experts, of which a router chooses a few for each token."""
    num_moe_experts: Width = 8
    moe_router_topk: Width = 2
    moe_ffn_hidden_size: Width
    """Width of one expert."""
    moe_capacity_factor: float | None = Field(default=None, gt=0, le=1 << 20)
    """null: dropless; else an expert takes at most ceil(factor * topk * seq_length / experts) tokens of a row."""
    balance: BalanceConfig = BiasBalance()
    moe_z_loss_coeff: float = Field(default=1e-3, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk={self.moe_router_topk} is more than num_moe_experts={self.num_moe_experts}"
            )
        return self

    def cost(self, hidden_size: int) -> Cost:
        expert, E, k = 3 * hidden_size * self.moe_ffn_hidden_size, self.num_moe_experts, self.moe_router_topk
        chosen = Cost(experts=E * expert, idle=(E - k) * expert, forward=2 * k * expert, backward=4 * k * expert)
        return matrices(replicated=E * hidden_size) + chosen


class MoE(nn.Module):
    """`sum_i w_i D_i(SiLU(G_i u) * (U_i u))` over the chosen experts, no biases.  Without moe_capacity_factor dropless.

    Run-time storage is fused: `gate_up [E, 2F, D]` (gate first), `down [E, D, F]`, of the experts that are here.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.top_k, self.capacity_factor = config.moe_router_topk, config.moe_capacity_factor
        self.balance_over: BalanceScope = config.balance.scope
        self.parts = parts
        self.balance = Balance(config.num_moe_experts, config.balance)
        self.router = nn.Linear(hidden_size, config.num_moe_experts, bias=False)
        self.dispatcher = parts.token_dispatcher(config.num_moe_experts)
        width = config.moe_ffn_hidden_size // self.dispatcher.width_parts
        self.gate_up = nn.Parameter(torch.empty(self.dispatcher.count, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(self.dispatcher.count, hidden_size, width))

    def stored(self) -> dict[str, Stored]:
        F_, found = self.down.shape[2], {"router.weight": Stored("router.weight")}
        # Tensor parallelism cuts experts by width only where each process has a part of all of them.
        rows, columns = (0, 1) if self.dispatcher.count == self.dispatcher.num_experts else (None, None)
        for i in range(self.dispatcher.count):
            e = self.dispatcher.first + i
            found[f"experts.{e}.gate.weight"] = Stored("gate_up", (i, slice(0, F_)), rows, expert=True)
            found[f"experts.{e}.up.weight"] = Stored("gate_up", (i, slice(F_, 2 * F_)), rows, expert=True)
            found[f"experts.{e}.down.weight"] = Stored("down", (i,), columns, expert=True)
        return found

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Routing]:
        logits, x = router_logits(x, self.parts.shared(self.router.weight))
        # Balance losses and capacity are of whole rows, wherever their tokens are.
        logits = self.parts.whole_sequence(logits, partial_gradients=False)
        # Dropping is a training device: evaluation and streaming are dropless, or they would depend on the split.
        capacity_factor = self.capacity_factor if self.training else None
        routing = route(
            logits,
            top_k=self.top_k,
            capacity_factor=capacity_factor,
            balance_over=self.balance_over,
            bias=self.balance.bias(),
            shares=self.balance.shares if self.balance.has_shares else None,
        )
        if torch.is_grad_enabled():  # evaluation and generation ask for nothing
            routing.sample = sampled(x)
        x, experts, weights = self.dispatcher.prepare(x, routing.experts, routing.weights)
        flat, E = experts.flatten(), self.dispatcher.num_experts
        if capacity_factor is not None:
            # Dropped assignments sort last, behind every expert, and are computed by none.
            flat = torch.where(flat < 0, E, flat)
        load = routing.load if len(experts) == len(routing.experts) else count(flat, E)
        announced = self.dispatcher.announce(load)
        place = sorted_places(flat, E + 1).view_as(experts)
        inputs = dispatch(x.flatten(0, 1), place)
        outputs = self.dispatcher.run(inputs, load, announced, self._experts)
        y = combine(outputs, place, weights)
        return self.dispatcher.finish(y.view_as(x)), routing

    def _experts(self, inputs: Float[Tensor, "m D"], load: Int[Tensor, " E"]) -> Float[Tensor, "m D"]:
        """Expert e computes its `load[e]` rows; rows past the last expert (dropped) come out as 0."""
        boundaries = load.new_zeros(len(load) + 1, dtype=torch.int32)
        torch.cumsum(load, 0, dtype=torch.int32, out=boundaries[1:])
        covered = not (self.training and self.capacity_factor is not None)
        gate_up = grouped_linear(inputs, self.gate_up, boundaries, covered=covered)
        return grouped_linear(swiglu(gate_up), self.down, boundaries, covered=covered)
