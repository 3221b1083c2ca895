"""What makes a layout legal: one table of rules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the model's module needs torch, its arithmetic does not
    from lfm.layout.config import ParallelConfig
    from lfm.models.lfm import LFMConfig


@dataclass(frozen=True)
class Request:
    """What a user asks for, as far as the rules look at it; `m` and `p` are short for the rules' sentences."""

    m: "LFMConfig"
    p: "ParallelConfig"
    world: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def data(self) -> int:
        return self.world // (self.p.tensor * self.p.pipeline)

    @property
    def stage_layers(self) -> list[int]:
        return list(self.p.stage_layers or ())

    @property
    def heads(self) -> int:
        """0: there is no attention."""
        return self.m.attention.num_attention_heads if self.m.attention is not None else 0

    @property
    def experts(self) -> int:
        return self.m.moe.num_moe_experts if self.m.moe is not None else 1

    @property
    def chunks(self) -> int:
        return self.p.pipeline * self.p.virtual_pipeline

    @property
    def smallest_world(self) -> int:
        return self.p.pipeline * math.lcm(self.p.tensor, self.p.expert)

    @property
    def processes(self) -> str:
        return f"{self.world} process" + ("es" if self.world > 1 else "")

    @property
    def rows(self) -> int:
        """Of one micro-batch on all data ranks."""
        return self.data * self.micro_batch_size

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.rows


class Rule(NamedTuple):
    broken: Callable[[Request], object]
    """Whether a request breaks the rule; it may rely on the rules before it."""
    what: str
    """Keys and values in conflict, a format string of the request `r`."""
    why: str = ""


def _tensor_divides(name: str, size: Callable[[Request], int]) -> Rule:
    """`size` gives 0 where the rule does not apply."""
    return Rule(lambda r: size(r) % r.p.tensor, f"parallel.tensor={{r.p.tensor}} does not divide {name}")


# In this order: what the model alone decides, the number of processes, what the engines can do, the batch.
RULES = (
    _tensor_divides("attention.num_attention_heads={r.heads}", lambda r: r.heads),
    _tensor_divides(
        "attention.num_query_groups={r.m.attention.num_query_groups}",
        lambda r: r.m.attention.num_query_groups if r.m.attention else 0,
    ),
    _tensor_divides("seq_length={r.m.seq_length}", lambda r: r.m.seq_length),
    _tensor_divides("padded_vocab_size={r.m.padded_vocab_size}", lambda r: r.m.padded_vocab_size),
    _tensor_divides(
        "liquid.num_reservoirs={r.m.liquid.num_reservoirs} x liquid.reservoir_size={r.m.liquid.reservoir_size}",
        lambda r: r.m.reservoir.num_reservoirs * r.m.reservoir.reservoir_size if r.m.reservoir else 0,
    ),
    _tensor_divides(
        "ffn.moe_ffn_hidden_size={r.m.ffn.moe_ffn_hidden_size}",
        lambda r: r.m.moe.moe_ffn_hidden_size if r.m.moe and r.p.expert == 1 else 0,
    ),
    Rule(
        lambda r: r.experts % r.p.expert,
        "parallel.expert={r.p.expert} does not divide ffn.num_moe_experts={r.experts}",
    ),
    Rule(
        lambda r: r.chunks > r.m.num_layers,
        "parallel.pipeline={r.p.pipeline} x parallel.virtual_pipeline={r.p.virtual_pipeline} is more than "
        "num_layers={r.m.num_layers}",
        "every chunk needs a layer",
    ),
    Rule(
        lambda r: r.stage_layers and (len(r.stage_layers) != r.chunks or sum(r.stage_layers) != r.m.num_layers),
        "parallel.stage_layers={r.stage_layers} must be {r.chunks} numbers that sum to num_layers={r.m.num_layers}",
    ),
    Rule(
        lambda r: r.world % r.smallest_world,
        "parallel.tensor={r.p.tensor} x pipeline={r.p.pipeline} with expert={r.p.expert} does not fit on {r.processes}",
        "it takes a multiple of {r.smallest_world}",
    ),
    Rule(
        lambda r: r.p.tensor > 1 and not r.p.sequence_parallel,
        "parallel.tensor={r.p.tensor} does not go with parallel.sequence_parallel=false",
        "the mixture of experts would route every token once per tensor rank",
    ),
    Rule(
        lambda r: r.p.sequence_parallel and r.p.tensor == 1,
        "parallel.sequence_parallel=true does not go with parallel.tensor=1",
        "it splits the sequence over the tensor ranks",
    ),
    Rule(
        lambda r: r.p.virtual_pipeline > 1 and r.p.pipeline == 1,
        "parallel.virtual_pipeline={r.p.virtual_pipeline} does not go with parallel.pipeline=1",
        "there is nothing to interleave",
    ),
    Rule(
        lambda r: r.p.zero_stage == 0 and r.world > 1,
        "parallel.zero_stage=0 does not go with world size {r.world}",
        "stage 0 is the local engine of one process",
    ),
    Rule(
        lambda r: r.p.zero_stage == 2 and r.p.pipeline > 1,
        "parallel.zero_stage=2 does not go with parallel.pipeline={r.p.pipeline}",
        "ZeRO-2 ends its gradient reduction once per forward pass and 1F1B ends with several backward passes",
    ),
    Rule(
        lambda r: r.p.zero_stage == 3 and r.p.pipeline > 1,
        "parallel.zero_stage=3 does not go with parallel.pipeline={r.p.pipeline}",
        "ZeRO-3 traces parameters over all ranks and deadlocks when stages run at different times",
    ),
    Rule(
        lambda r: r.p.zero_stage == 3 and r.p.expert > 1,
        "parallel.zero_stage=3 does not go with parallel.expert={r.p.expert}",
        "DeepSpeed has no expert parallelism at ZeRO-3",
    ),
    Rule(
        lambda r: r.p.zero_stage == 2 and r.p.expert > 1 and r.p.tensor > 1,
        "parallel.zero_stage=2 does not go with parallel.expert={r.p.expert} and parallel.tensor={r.p.tensor}",
        "with experts spread over tensor ranks only ZeRO-1 is proved equal to one process",
    ),
    Rule(
        lambda r: r.p.offload_optimizer and r.p.zero_stage < 2,
        "parallel.offload_optimizer=true does not go with parallel.zero_stage={r.p.zero_stage}",
        "below ZeRO-2 the optimizer keeps its state on the device",
    ),
    Rule(
        lambda r: r.global_batch_size % r.rows,
        "training.global_batch_size={r.global_batch_size} is not a multiple of {r.rows}, data-parallel size {r.data} x "
        "training.micro_batch_size={r.micro_batch_size}",
    ),
    Rule(
        lambda r: r.p.virtual_pipeline > 1 and r.num_micro_batches % r.p.pipeline,
        "parallel.virtual_pipeline={r.p.virtual_pipeline} with {r.num_micro_batches} micro-batches does not go with "
        "parallel.pipeline={r.p.pipeline}",
        "the interleaved schedule takes micro-batches in groups of one per stage",
    ),
)


def first_broken(request: Request) -> Rule | None:
    return next((rule for rule in RULES if rule.broken(request)), None)
