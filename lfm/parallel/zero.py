"""DeepSpeed ZeRO: the optimizer side of a parallel run, and where each weight's fp32 state lies in it."""

import contextlib
import io
import logging
import os
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfm.parallel.groups import Groups

# DeepSpeed takes any GPU it sees; a run on CPU ranks says so before this import (`prepare_environment`).
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from deepspeed.utils import groups as deepspeed_groups

    from lfm.parallel.zero1 import make_zero1_engine

    deepspeed.utils.logger.setLevel(logging.ERROR)


def leave_shared_memory_alone() -> None:
    """On CPUs DeepSpeed compiles an all-reduce over /dev/shm whose buffers no process removes: do without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.pop("LOCAL_SIZE", None)


class _ModelParallelUnit:
    """DeepSpeed's view of the groups.  Its `model parallel` is tensor x pipeline."""

    def __init__(self, groups: Groups) -> None:
        named = {
            "model_parallel": groups.model,
            "tensor_model_parallel": groups.tensor,
            "pipeline_model_parallel": groups.pipeline,
            "data_parallel": groups.data,
        }
        for name, group in named.items():
            setattr(self, f"get_{name}_group", types.MethodType(lambda _, g=group: g, self))
            setattr(self, f"get_{name}_rank", types.MethodType(lambda _, g=group: g.rank(), self))
            setattr(self, f"get_{name}_world_size", types.MethodType(lambda _, g=group: g.size(), self))
        self.get_data_parallel_group_ranks = lambda: dist.get_process_group_ranks(groups.data)


class _ExpertMarker(DeepSpeedMoE):
    """Tells DeepSpeed, which looks for its own layer in the module tree, that experts have groups of their own."""

    def __init__(self, groups: Groups) -> None:
        nn.Module.__init__(self)
        self.groups = groups
        self.num_experts = groups.layout.expert  # read by DeepSpeed's own checkpoints alone

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        name = _expert_group_name(self.groups)
        for kind, group in (("EXPERT_PARALLEL", self.groups.expert), ("EXPERT_DATA_PARALLEL", self.groups.expert_data)):
            getattr(deepspeed_groups, f"_{kind}_GROUP")[name] = group
            getattr(deepspeed_groups, f"_{kind}_GROUP_RANKS")[name] = dist.get_process_group_ranks(group)


def _expert_group_name(groups: Groups) -> str:
    return f"ep_size_{groups.layout.expert}"


@dataclass(frozen=True)
class Weight:
    """A parameter of this process and what the optimizer must know of it."""

    name: str
    parameter: nn.Parameter
    is_expert: bool
    """Divided over the expert group: reduced over `expert_data` instead of `data`."""
    is_cut: bool
    """Tensor-parallel processes hold different parts."""
    is_copy: bool
    """The last stage's copy of a tied embedding; the first stage's is the one that counts."""
    is_wide: bool
    """In fp32 where the others are in bf16; not at ZeRO-3, which knows one dtype."""
    is_shared: bool = False
    """A tied embedding of which the first and the last stage hold a copy each."""


def make_engine(
    module: nn.Module,
    weights: Iterable[Weight],
    groups: Groups,
    *,
    build: Callable[[], torch.optim.Optimizer],
    update: Callable[..., None],
    new_state: Callable[[Tensor], dict[str, Any]],
    clip_grad: float,
    micro_batch_size: int,
) -> Any:
    """The DeepSpeed engine over `module`.  Collective.

    `build` makes the optimizer over the weights, which are in the order of the forward pass, in groups: at stage 1 the
    buckets of `Zero1`, else alike on every process, because ZeRO meets once for each.  A group's weights are alike in
    `is_expert` and `is_wide`.  `update`: of `Zero1`.  `new_state` makes its state beside a flat tensor of one group.
    """
    layout, weights = groups.layout, list(weights)
    if groups.device.type == "cpu":
        leave_shared_memory_alone()
    for weight in weights:
        p = cast(Any, weight.parameter)
        p.tensor_model_parallel = weight.is_cut or (weight.is_expert and layout.tensor > 1)
        p.ds_pipe_replicated = weight.is_copy
        if weight.is_expert:
            p.allreduce, p.group_name = False, _expert_group_name(groups)
    if any(weight.is_expert for weight in weights):
        module.add_module("expert_marker", _ExpertMarker(groups))
    experts = {id(weight.parameter) for weight in weights if weight.is_expert}

    wide = [(weight.parameter, weight.parameter.data) for weight in weights if weight.is_wide]
    assert not wide or layout.zero_stage < 3, "ZeRO-3 flattens weights of one dtype alone"

    def build_marked(_: Any) -> torch.optim.Optimizer:
        # DeepSpeed has cast every parameter to bf16 by now, and flattens them by group next.
        for parameter, tensor in wide:
            parameter.data = tensor
        optimizer = build()
        for group in optimizer.param_groups:
            if id(group["params"][0]) in experts:
                group |= {"moe": True, "name": _expert_group_name(groups)}
        return optimizer

    engine: Any
    config, mpu = _config(groups, weights, clip_grad, micro_batch_size), _ModelParallelUnit(groups)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every step of the way
        if layout.zero_stage == 1:
            # The last stage's copy of an embedding is the head.
            names = {weight.parameter: weight.name for weight in sorted(weights, key=lambda weight: weight.is_copy)}
            shared = [weight.parameter for weight in weights if weight.is_shared]
            engine = make_zero1_engine(
                module, groups, mpu, config, build=build_marked, update=update, names=names, shared=shared
            )
        else:
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=build_marked, mpu=mpu, config=config, dist_init_required=False
            )
    if wide and layout.zero_stage == 2:
        # The bucket of gradients on their way is of the first group's dtype.
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
    for flat in _flat_partitions(engine):
        inner_optimizer(engine).state[flat] = new_state(flat)
    return engine


def _config(groups: Groups, weights: list[Weight], clip_grad: float, micro_batch_size: int) -> dict[str, Any]:
    layout = groups.layout
    half = any(weight.parameter.dtype == torch.bfloat16 for weight in weights)
    # Buckets are allocated at their full size, so a small model gets small ones.  DeepSpeed wants an even number.
    sizes = [w.parameter.numel() for w in weights]
    bucket = min(200_000_000, -(-(max(sizes) + sum(sizes) // 8) // 2) * 2)
    zero: dict[str, Any] = {
        "stage": layout.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if layout.zero_stage == 3:
        # Small weights are partitioned like all others, so that one rule says where every weight's state lies.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
    if layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": groups.device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_grad,
        "steps_per_print": 2**62,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # ours, which tests compare with one process
        # Otherwise gradients would be rounded to bf16 at every hop of the reduction.
        "communication_data_type": "fp32",
    }
    if half:
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _flat_partitions(engine: Any) -> list[Tensor]:
    """The fp32 tensors that the inner optimizer updates: this process's partition of each parameter group."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise AssertionError(f"{type(engine.optimizer).__name__} holds no fp32 partitions")


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter whose fp32 state this process keeps: `numel` elements from `start` on, flattened."""

    start: int
    numel: int
    flat: Tensor
    """The partition that holds it, from `offset` on."""
    offset: int

    def view(self, of: Tensor) -> Tensor:
        """This fragment of a tensor laid out like `flat`: the master itself, its gradient or a moment."""
        return of.detach()[self.offset : self.offset + self.numel]


def fragments(engine: Any, weights: Iterable[Weight]) -> dict[str, Fragment | None]:
    """By weight name; None where other processes of the data-parallel group keep all of it."""
    optimizer, found = engine.optimizer, {}
    flats = _flat_partitions(engine)
    for weight in weights:
        p = cast(Any, weight.parameter)
        if hasattr(p, "ds_id"):  # ZeRO-3
            group, offset, size = optimizer.grad_position[p.ds_id]
            start = dist.get_rank(p.ds_process_group) * size
            numel = max(0, min(size, p.ds_numel - start))
            found[weight.name] = Fragment(start, numel, flats[group], offset) if numel else None
        elif p._hp_mapping is None:
            found[weight.name] = None
        else:
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            found[weight.name] = Fragment(here.start, here.numel, flats[p._hp_mapping.param_group_index], there.start)
    return found


def publish_masters(engine: Any, weights: Iterable[Weight], where: Mapping[str, Fragment | None]) -> None:
    """Copy the fp32 masters into the working weights, everywhere.  Collective; `Zero1` only starts it."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()
        return
    # After an evaluation some weights are still gathered: left so, the next pass would not read their partitions.
    engine.empty_partition_cache()
    for weight in weights:
        fragment, partition = where[weight.name], cast(Any, weight.parameter).ds_tensor
        if fragment is not None:
            partition.data[: fragment.numel].copy_(fragment.view(fragment.flat))


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """What `build` made, over the fp32 partitions."""
    return engine.optimizer.optimizer


class EngineAsModule(nn.Module):
    """What a schedule calls at ZeRO-2 and 3, where each pass must go through the DeepSpeed engine and its hooks."""

    def __init__(self, engine: Any, stage: nn.Module) -> None:
        super().__init__()
        self.config, self.model_type = stage.config, stage.model_type
        # Not as a submodule: the weights belong to the engine's own tree.
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "stage", stage)

    def set_input_tensor(self, tensor: Any) -> None:
        cast(Any, self).stage.set_input_tensor(tensor)

    def forward(self, *inputs: Any) -> Tensor:
        return cast(Any, self).engine(*inputs)
