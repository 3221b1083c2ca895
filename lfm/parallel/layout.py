"""How a run is spread over processes, and which spreads are legal.  Pure arithmetic: nothing here touches a device."""

from pydantic import Field, PositiveInt

from lfm.config import Config
from lfm.errors import UserError
from lfm.models.registry import ModelConfig


class ParallelConfig(Config):
    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks a stage holds (interleaved schedule)."""
    expert: PositiveInt = 1
    """Expert-parallel size."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence."""
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each stage, first to last; null: balanced automatically."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage; 0 on one process is the local engine."""


def check_layout(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Raise UserError, naming the nearest legal value, unless `model` divides over this layout of `world_size`."""
    tp, pp, ep = parallel.tensor, parallel.pipeline, parallel.expert
    divided = {
        "tensor": {
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            **({"moe_ffn_hidden_size": model.moe_ffn_hidden_size} if ep == 1 else {}),
            **({"seq_length": model.seq_length} if parallel.sequence_parallel else {}),
        },
        "expert": {"num_moe_experts": model.num_moe_experts},
    }
    if model.liquid is not None:
        width = model.liquid.num_reservoirs * model.liquid.reservoir_size
        divided["tensor"]["liquid.num_reservoirs * liquid.reservoir_size"] = width
    for axis, sizes in divided.items():
        size = getattr(parallel, axis)
        for name, value in sizes.items():
            if value % size:
                legal = [n for n in range(1, value + 1) if all(v % n == 0 for v in sizes.values())]
                nearest = min(legal, key=lambda n: abs(n - size))
                raise UserError(
                    f"parallel.{axis}={size} does not divide {name}={value}; the nearest legal is {nearest}"
                )
    if pp * parallel.virtual_pipeline > model.num_layers:
        raise UserError(
            f"parallel.pipeline={pp} times virtual_pipeline={parallel.virtual_pipeline} needs that many layers and "
            f"num_layers is {model.num_layers}; use pipeline={max(1, model.num_layers // parallel.virtual_pipeline)}"
        )
    if parallel.stage_layers is not None:
        chunks = pp * parallel.virtual_pipeline
        if len(parallel.stage_layers) != chunks or sum(parallel.stage_layers) != model.num_layers:
            raise UserError(
                f"parallel.stage_layers={list(parallel.stage_layers)} must be {chunks} numbers "
                f"that sum to num_layers={model.num_layers}"
            )
    smallest = max(tp * pp, pp * ep if tp == 1 else tp * pp * max(1, ep // tp))
    if world_size % (tp * pp) or world_size % (pp * ep):
        raise UserError(
            f"parallel.tensor={tp} x pipeline={pp} with expert={ep} does not fit on {world_size} process(es); "
            f"start a multiple of {smallest}, or lower the sizes"
        )
