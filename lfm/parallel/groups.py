"""Process groups, made once by megatron-core and passed on as values."""

import datetime
import importlib
import os
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from lfm.job.process import Process
from lfm.job.rendezvous import meet
from lfm.layout.layout import Layout
from lfm.parallel.links import Links, make_links

with warnings.catch_warnings():
    # It warns about transformer-engine and apex, which are not used here.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


@dataclass(frozen=True)
class Groups:
    """This process's place in the layout.  A group of one process is a group too."""

    layout: Layout
    rank: int
    device: torch.device
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup
    """Tensor x pipeline: the processes that hold one copy of the dense weights."""
    expert: dist.ProcessGroup
    """Processes among which the experts of a layer are divided."""
    expert_data: dist.ProcessGroup
    """Processes that hold the same experts."""
    embedding: dist.ProcessGroup | None
    """First and last stage, on those stages alone."""
    links: Links | None
    """To and from the neighbouring stages, where there are several."""


def join(process: Process, device: torch.device, timeout_seconds: float, store: Store | None = None) -> None:
    """Enter the default process group: NCCL for GPUs, gloo for CPUs.  `store`: where all have met; None: meet first."""
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))  # DeepSpeed reads it
    if process.address in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if process.world_size > 1:
        store = PrefixStore("default_pg", store or meet(process, limit_seconds=timeout_seconds))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store or HashStore(),
        rank=process.rank,
        world_size=process.world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )


def make_groups(layout: Layout, device: torch.device) -> Groups:
    """Collective over all processes; once a run."""
    # megatron-core calls by their old names what torch has renamed.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    if device.type == "cpu":
        _run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    on_an_end = layout.pipeline > 1 and parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(pipeline, dist.ProcessGroup)
    place: dict[str, Any] = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": pipeline,
        "data": parallel_state.get_data_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
        "embedding": parallel_state.get_embedding_group() if on_an_end else None,
        "links": make_links(layout, dist.get_process_group_ranks(pipeline), device),
    }
    return Groups(layout=layout, rank=dist.get_rank(), device=device, **place)


def gloo_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A further group of all processes over their CPUs, for what must not wait for a GPU.  Collective."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup)
    return group


def leave() -> None:
    """Drop all groups, so that another layout can follow in the same process."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


_FACADE_MODULES = (
    "megatron.core.utils",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
)


class _CudaOnCpu(types.ModuleType):
    """`torch.cuda` of the modules above: the current device is the CPU."""

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize() -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu(types.ModuleType):
    """`torch` of the modules above."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu("torch.cuda")

    @staticmethod
    def zeros(*size: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **(options | {"device": "cpu"} if options.get("device") == "cuda" else options))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _run_megatron_on_cpu() -> None:
    """Give five megatron-core modules, which take the device to be a GPU, a `torch` of their own; no others."""
    facade = _TorchOnCpu()
    for name in _FACADE_MODULES:
        module = importlib.import_module(name)
        if getattr(module, "torch", None) is torch:
            module.torch = facade  # type: ignore[attr-defined]
