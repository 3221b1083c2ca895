"""The layout a user asks for."""

from pydantic import Field, model_validator
from typing_extensions import Self

from lfm.config import Config, Depth

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
