"""How a run is spread over processes.  Pure arithmetic: nothing here touches a device."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lfm.errors import UserError
from lfm.layout.balance import balance, balanced_sizes, stage_loads
from lfm.layout.config import ParallelConfig
from lfm.layout.fastest import fastest_sizes
from lfm.layout.nearest import refusal
from lfm.layout.rules import Request, first_broken
from lfm.layout.stage_times import stage_times

if TYPE_CHECKING:  # the model's module needs torch, its arithmetic does not
    from lfm.models.registry import ModelConfig


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
    """Mean cost of a pipeline stage over that of the most loaded one."""
    card: str | None = None
    """Costs are times measured on it; None: FLOPs."""

    def stage_chunks(self, pipeline_rank: int) -> tuple[tuple[int, ...], ...]:
        """Layer numbers of each chunk of one pipeline rank."""
        return self.chunk_layers[pipeline_rank :: self.pipeline]

    @property
    def waiting_passes(self) -> int:
        """Backward passes of a stage whose weight gradients wait while there are forward passes to come.

        Those of the pass before the last fill the waits of the plain schedule.  Interleaved stages wait little: there
        gradients of weights only follow those of inputs, and nothing is kept for longer.
        """
        return waiting_passes(self.pipeline, self.virtual_pipeline)

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
            costs = "FLOPs" if self.card is None else f"times on {self.card}"
            text += f"; stages {' | '.join(stages)} + head, balance {self.balance:.2f} by {costs}"
        return text


def waiting_passes(pipeline: int, virtual_pipeline: int) -> int:
    """`Layout.waiting_passes`."""
    return 1 if pipeline > 1 and virtual_pipeline == 1 else 0


def check_layout(
    model: "ModelConfig",
    parallel: ParallelConfig,
    world_size: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    half: bool = False,
    card: str | None = None,
) -> Layout:
    """The layout of `model` over `world_size` processes; `half`: with weights in bf16.

    `card`, the name of the GPUs: stages are balanced by time where there is a table of it in `costs/`, else by FLOPs.
    Raises UserError where it is not legal, naming the keys in conflict and the nearest legal layout of as many
    processes, or the nearest number of processes that has one.
    """
    r = Request(model, parallel, world_size, global_batch_size, micro_batch_size, half)
    rule = first_broken(r)
    if rule is not None:
        raise UserError(refusal(rule, r))
    p = parallel
    times = stage_times(model, card, rows=micro_batch_size, tensor=p.tensor) if p.pipeline > 1 else None
    if times is None:
        costs, head = [model.layer_cost(layer).flops for layer in range(model.num_layers)], model.head_flops
        sizes = p.stage_layers or balanced_sizes(costs, head, p.pipeline, p.virtual_pipeline)
    else:
        costs, head = times.costs, times.head.total
        keep = waiting_passes(p.pipeline, p.virtual_pipeline)
        sizes = p.stage_layers or fastest_sizes(times, p.pipeline, p.virtual_pipeline, r.num_micro_batches, keep=keep)
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
        balance=balance(stage_loads(costs, head, sizes, p.pipeline)),
        card=times.card if times is not None else None,
    )
