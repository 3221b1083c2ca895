"""What makes a layout legal: one table of rules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the model's module needs torch, its arithmetic does not
    from lfm.layout.config import ParallelConfig
    from lfm.models.registry import ModelConfig


@dataclass(frozen=True)
class Request:
    """What a user asks for, as far as the rules look at it; `m` and `p` are short for the rules' sentences."""

    m: "ModelConfig"
    p: "ParallelConfig"
    world: int
    global_batch_size: int
    micro_batch_size: int
    half: bool = False
    """Whether weights are in bf16."""

    @property
    def spread(self) -> str:
        """What the model is laid out over, in words."""
        return " and ".join(key for key in ("data", "tensor", "pipeline", "expert") if key in self.m.lays_out)

    @property
    def not_divided_by_tensor(self) -> str:
        """`key=size` of the first size that the tensor-parallel size does not divide; empty: it divides all."""
        return _first_not_divided(self.m.tensor_divides(experts_are_whole=self.p.expert > 1), self.p.tensor)

    @property
    def not_divided_by_expert(self) -> str:
        return _first_not_divided(self.m.expert_divides(), self.p.expert)

    @property
    def tensor_sizes(self) -> list[int]:
        """Every tensor-parallel size that the model allows."""
        sizes = self.m.tensor_divides(experts_are_whole=True).values() if "tensor" in self.m.lays_out else (1,)
        return divisors(math.gcd(*sizes))

    @property
    def pipeline_sizes(self) -> range:
        return range(1, self.m.num_layers + 1 if "pipeline" in self.m.lays_out else 2)

    @property
    def expert_sizes(self) -> list[int]:
        return divisors(math.gcd(*self.m.expert_divides().values()) or 1)

    @property
    def data(self) -> int:
        return self.world // (self.p.tensor * self.p.pipeline)

    @property
    def stage_layers(self) -> list[int]:
        return list(self.p.stage_layers or ())

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


def _first_not_divided(sizes: Mapping[str, int], by: int) -> str:
    return next((f"{key}={size}" for key, size in sizes.items() if size % by), "")


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class Rule(NamedTuple):
    broken: Callable[[Request], object]
    """Whether a request breaks the rule; it may rely on the rules before it."""
    what: str
    """Keys and values in conflict, a format string of the request `r`."""
    why: str = ""


def _laid_out(key: str) -> Rule:
    """The family must be one that is spread over it."""
    return Rule(
        lambda r: getattr(r.p, key) > 1 and key not in r.m.lays_out,
        f"parallel.{key}={{r.p.{key}}} does not go with model.kind={{r.m.kind}}",
        "this model is spread over {r.spread} alone",
    )


# In this order: what the model alone decides, the number of processes, what the engines can do, the batch.
RULES = (
    _laid_out("tensor"),
    _laid_out("pipeline"),
    _laid_out("expert"),
    Rule(lambda r: r.not_divided_by_tensor, "parallel.tensor={r.p.tensor} does not divide {r.not_divided_by_tensor}"),
    Rule(lambda r: r.not_divided_by_expert, "parallel.expert={r.p.expert} does not divide {r.not_divided_by_expert}"),
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
        "what lies between the cut matrices would be computed once per tensor rank",
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
        lambda r: r.p.zero_stage > 1 and not r.m.row_is_one_pass,
        "parallel.zero_stage={r.p.zero_stage} does not go with model.kind={r.m.kind}",
        "its rows are differentiated in several passes, and ZeRO-2 and 3 reduce gradients after one",
    ),
    Rule(
        lambda r: r.p.zero_stage == 3 and r.half and r.m.has_wide_parameters,
        "parallel.zero_stage=3 does not go with model.kind={r.m.kind} in bfloat16",
        "some of its parameters stay in fp32, and ZeRO-3 gathers those of one dtype",
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
