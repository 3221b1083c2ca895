"""How a run is spread over processes, and which spreads are legal.  Pure arithmetic: nothing here touches a device.

`python -m lfm.parallel.layout docs/parallelism.md` writes that page's table.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from typing_extensions import Self

from lfm.config import Config, Depth
from lfm.errors import UserError
from lfm.parallel.rules import Request, first_broken, refusal
from lfm.parallel.stages import balance, balanced_sizes, stage_loads

if TYPE_CHECKING:  # the model's module needs torch, its arithmetic does not
    from lfm.models.registry import ModelConfig


_LONGEST_SECONDS = 30 * 86400


class ParallelConfig(Config):
    tensor: Depth = 1
    """Tensor-parallel size."""
    pipeline: Depth = 1
    """Pipeline stages."""
    virtual_pipeline: Depth = 1
    """Model chunks a stage holds (interleaved schedule)."""
    expert: Depth = 1
    """Expert-parallel size."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence; goes with tensor > 1."""
    stage_layers: tuple[Depth, ...] | None = None
    """Layers of each of the pipeline * virtual_pipeline chunks, first to last; null: balanced automatically."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage; 0 on one process is the local engine."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO-2 and 3)."""
    rendezvous_timeout_seconds: float = Field(default=600, le=_LONGEST_SECONDS)
    """At least 10: the first rank waits this long for the last; imports from a cold shared disk take minutes."""
    heartbeat_timeout_seconds: float = Field(default=15, le=_LONGEST_SECONDS)
    """At least 5: a rank without a sign of life for this long ends all."""
    hang_timeout_seconds: float = Field(default=900, le=_LONGEST_SECONDS)
    """At least 10: longest time in one phase before the run is taken to hang."""

    @model_validator(mode="after")
    def _check_timeouts(self) -> Self:
        lowest = {
            "rendezvous_timeout_seconds": (10, "the ranks of a healthy job start seconds apart"),
            "heartbeat_timeout_seconds": (5, "a healthy rank gives a sign of life once a second, on a busy host later"),
            "hang_timeout_seconds": (10, "in a healthy run some phases take seconds, such as a first step"),
        }
        for key, (seconds, why) in lowest.items():
            value = getattr(self, key)
            if value < seconds:
                raise ValueError(f"{key}={value:g} is below {seconds}: {why}")
        return self


@dataclass(frozen=True)
class Layout:
    """A legal spread of one model over `world` processes; sizes are numbers of ranks."""

    world: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    expert_tensor: int
    """Ranks that cut one expert by width."""
    data: int
    expert_data: int
    """Ranks that hold the same experts."""
    sequence_parallel: bool
    zero_stage: int
    offload_optimizer: bool
    num_micro_batches: int
    """Of one optimizer step on one data rank."""
    chunk_layers: tuple[tuple[int, ...], ...]
    """Layer numbers of every chunk, in model order; chunk `v * pipeline + r` is chunk `v` of pipeline rank `r`."""
    balance: float
    """Mean FLOPs of a pipeline stage over those of the most loaded one."""

    def stage_chunks(self, pipeline_rank: int) -> tuple[tuple[int, ...], ...]:
        """Layer numbers of each chunk of one pipeline rank."""
        return self.chunk_layers[pipeline_rank :: self.pipeline]

    @property
    def name(self) -> str:
        """Short form, such as `TP2+SP x PP2 x DP2 Z1`."""
        tensor = [f"TP{self.tensor}" + ("+SP" if self.sequence_parallel else "")] if self.tensor > 1 else []
        chunks = f"/VP{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        pipeline = [f"PP{self.pipeline}{chunks}"] if self.pipeline > 1 else []
        data = [f"DP{self.data}"] if self.data > 1 or self.world == 1 else []
        expert = f" EP{self.expert}" if self.expert > 1 else ""
        offload = "+offload" if self.offload_optimizer else ""
        return " x ".join([*tensor, *pipeline, *data]) + f"{expert} Z{self.zero_stage}{offload}"

    def describe(self) -> str:
        """The layout in one line, with its pipeline stages and their balance if there are several."""
        micro_batches = f"{self.num_micro_batches} micro-batch" + ("es" if self.num_micro_batches > 1 else "")
        if self.zero_stage == 0:
            return f"world 1, local engine, {micro_batches}"
        parts = [f"world {self.world} = tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"]
        if self.sequence_parallel:
            parts.append("sequence parallel")
        if self.expert > 1:
            parts.append(f"expert {self.expert} (expert-data {self.expert_data})")
        parts.append(
            f"ZeRO-{self.zero_stage}" + (" with optimizer state in host memory" if self.offload_optimizer else "")
        )
        parts.append(micro_batches)
        text = ", ".join(parts)
        if self.pipeline > 1:
            stages = ["+".join(str(len(chunk)) for chunk in self.stage_chunks(r)) for r in range(self.pipeline)]
            text += f"; stages {' | '.join(stages)} + head, balance {self.balance:.2f}"
        return text


def check_layout(
    model: "ModelConfig",
    parallel: ParallelConfig,
    world_size: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
) -> Layout:
    """The layout of `model` over `world_size` processes.

    Raises UserError where it is not legal, naming the keys in conflict and the nearest legal layout of as many
    processes, or the nearest number of processes that has one.
    """
    if model.kind != "lfm":
        return _one_process(model, parallel, world_size, global_batch_size // micro_batch_size)
    r = Request(model, parallel, world_size, global_batch_size, micro_batch_size)
    rule = first_broken(r)
    if rule is not None:
        raise UserError(refusal(rule, r))
    p = parallel
    costs = [model.layer_flops(layer) for layer in range(model.num_layers)]
    sizes = p.stage_layers or balanced_sizes(costs, model.head_flops, p.pipeline, p.virtual_pipeline)
    ends = list(itertools.accumulate(sizes))
    return Layout(
        world=world_size,
        tensor=p.tensor,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        expert=p.expert,
        expert_tensor=p.tensor if p.expert == 1 else 1,
        data=r.data,
        expert_data=r.data if p.expert == 1 else world_size // (p.pipeline * p.expert),
        sequence_parallel=p.sequence_parallel,
        zero_stage=p.zero_stage,
        offload_optimizer=p.offload_optimizer,
        num_micro_batches=r.num_micro_batches,
        chunk_layers=tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)),
        balance=balance(stage_loads(costs, model.head_flops, sizes, p.pipeline)),
    )


def _one_process(model: "ModelConfig", parallel: ParallelConfig, world_size: int, num_micro_batches: int) -> Layout:
    """The layout of the families that have no other."""
    asked = {key: value for key, value in dict(parallel).items() if value != getattr(ParallelConfig(), key)}
    asked = {key: value for key, value in asked.items() if not key.endswith("_seconds")}
    if world_size > 1 or asked:
        what = " and ".join(
            [f"{world_size} processes"] * (world_size > 1) + [f"parallel.{key}={asked[key]}" for key in asked]
        )
        raise UserError(
            f"model.kind={model.kind} trains in one process with the local engine, not with {what}; start it with "
            "plain python and no parallel keys (lfm is the family that spreads)"
        )
    return Layout(
        world=1,
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        expert=1,
        expert_tensor=1,
        data=1,
        expert_data=1,
        sequence_parallel=False,
        zero_stage=0,
        offload_optimizer=False,
        num_micro_batches=num_micro_batches,
        chunk_layers=(tuple(range(model.num_layers)),),
        balance=1.0,
    )


BEGIN, END = "<!-- layouts: python -m lfm.parallel.layout docs/parallelism.md -->", "<!-- /layouts -->"


def compatibility_table() -> str:
    """Which layouts go with which ZeRO stages, as Markdown: the rules, asked about a small model."""
    from lfm.models.lfm import LFMConfig

    model = LFMConfig(
        hidden_size=32, num_layers=4, num_attention_heads=4, num_query_groups=2, seq_length=64, moe_ffn_hidden_size=32
    )
    tensor, pipeline, expert = {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"expert": 2}
    interleaved = {**pipeline, "virtual_pipeline": 2}
    rows = {
        "one process": (1, {}),
        "DP": (2, {}),
        "TP+SP": (4, tensor),
        "PP": (4, pipeline),
        "PP interleaved": (4, interleaved),
        "EP": (4, expert),
        "TP+SP x PP": (8, tensor | pipeline),
        "TP+SP x PP interleaved": (8, tensor | interleaved),
        "TP+SP x EP": (8, tensor | expert),
        "PP x EP": (8, pipeline | expert),
        "PP interleaved x EP": (8, interleaved | expert),
        "TP+SP x PP x EP": (16, tensor | pipeline | expert),
    }
    columns = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in range(4)}
    columns |= {f"{name} + offload": {**keys, "offload_optimizer": True} for name, keys in list(columns.items())[1:]}
    reasons: list[str] = []
    lines = ["| layout | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, (world, sizes) in rows.items():
        cells = []
        for zero in columns.values():
            rule = first_broken(Request(model, ParallelConfig(**{**sizes, **zero}), world, 16, 1))
            if rule is not None and rule.why not in reasons:
                reasons.append(rule.why)
            cells.append("yes" if rule is None else f"no ({reasons.index(rule.why) + 1})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def main() -> None:
    page = Path(sys.argv[1])
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{compatibility_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
