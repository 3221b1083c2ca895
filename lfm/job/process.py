"""Which process this is: rank, world size and rendezvous, from `torchrun`, `deepspeed` or `srun` alike."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from lfm.errors import UserError


@dataclass(frozen=True)
class Process:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: its GPU."""
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    """Rendezvous, of rank 0's machine."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Process":
        """One process where no launcher left its variables.  Raises UserError for incomplete or malformed ones."""
        if "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        elif "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        else:
            return cls()
        numbers = [_number(environment, name) for name in names]
        if numbers[0] >= numbers[1]:
            raise UserError(f"{names[0]}={numbers[0]} is not below {names[1]}={numbers[1]}; ranks count from 0")
        if numbers[1] == 1:
            # The deepspeed launcher sets these for one process too; DeepSpeed itself may still want a rendezvous.
            port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else 0
            return cls(address=environment.get("MASTER_ADDR", "127.0.0.1"), port=port)
        if not environment.get("MASTER_ADDR"):
            raise UserError(
                f"{names[1]}={numbers[1]} but MASTER_ADDR is not set; use slurm/train_3b.sh, or export MASTER_ADDR and "
                "MASTER_PORT of the first node"
            )
        local = [v for k in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE") if (v := environment.get(k))]
        return cls(
            rank=numbers[0],
            world_size=numbers[1],
            local_rank=numbers[2],
            local_world_size=int(local[0]) if local and local[0].isdecimal() else numbers[1],
            address=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT"),
        )


def require_packages() -> None:
    """Raises UserError, saying how to install it, when a package of the parallel engine is missing."""
    for package in ("megatron-core", "deepspeed"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"layouts with parallel.zero_stage >= 1 need {package}, which is not installed: "
                "pip install 'lfm-training[parallel]'"
            ) from None


def prepare_environment(device_type: str, *, tensor: int = 1) -> None:
    """What megatron-core and DeepSpeed read when they are imported, or CUDA when it starts: call it before.

    `tensor`: the tensor-parallel size.
    """
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # megatron-core decorates helpers with torch.compile, which CPU ranks have no use for.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if tensor > 1:
        # Sequence parallelism overlaps communication with matrix products only when kernels run in launch order;
        # without GPUs too, megatron-core warns where this is not set.  ZeRO-1's messages under the passes would queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(f"variable {name}={text!r} is not a number; start through torchrun, deepspeed or srun")
    return int(text)
