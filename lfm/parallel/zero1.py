"""ZeRO-1 by buckets: gradients are reduced while the last backward pass runs, weights gathered under the next forward.

DeepSpeed's `BF16_Optimizer` partitions each parameter group by itself and sums gradients in one flat fp32 tensor a
group.  A group is a bucket here: slice r of its flat gradient is the partition of rank r, so that it is reduced and
scattered in place.  One class for weights in fp32 and in bf16, so that what is certified is what trains.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from lfm.kernels.backend import widest
from lfm.kernels.gradient_sum import GradientSum, give_sum
from lfm.parallel.groups import Groups

# Rank 0 collects garbage twice for each group, to print its memory: half a minute for a hundred buckets.
bf16_optimizer.see_memory_usage = lambda *_, **__: None

Update = Callable[..., None]
"""`OptimizerKind.update`."""


@dataclass
class Bucket:
    """Parameters that are reduced, updated and gathered together; every tensor is flat and of one layout."""

    parameters: list[nn.Parameter]
    gradient: Tensor
    """fp32; after the reduction only this rank's slice is a sum over the ranks."""
    own_gradient: Tensor
    """This rank's slice of it: the gradient of `master`."""
    working: Tensor
    """The weights of the model."""
    own_working: Tensor
    master: Tensor
    """fp32: what this rank updates."""
    group: dist.ProcessGroup
    """A communicator of the bucket's own: its messages overlap those of the passes."""
    sums: list[GradientSum] = field(default_factory=list)
    additions: list[int] = field(default_factory=list)
    """By parameter, in this step."""
    due: list[int] | None = None
    """As many there were in the first step of as many micro-batches; a parameter that had none then lacks in all."""
    seen: dict[int, list[int]] = field(default_factory=dict)
    """`due` by number of micro-batches."""
    has_left: bool = False
    lacking: int = 0
    """Parameters that still await an addition."""
    reduction: dist.Work | None = None
    gathering: dist.Work | None = None


class Zero1(BF16_Optimizer):
    """Masters, partitions and the links between them are DeepSpeed's; when what moves between ranks is not.

    A step: `start_gradients`, forward and backward passes, `finish_gradients`, `squared_norm`, `step`.  None of them
    waits for a GPU.  Buckets leave in the reverse order of the forward pass on every rank, whatever the order in which
    they become whole: collectives of one communicator must not cross.

    Over the ranks gradients are summed in fp32, in the order of NCCL's reduce-scatter, or of gloo's all-reduce on CPUs
    (it has no reduce-scatter in place): fixed for a layout and a machine, and another than one process's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[nn.Parameter, str],
        groups: Groups,
        mpu: Any,
        *,
        update: Update,
        has_experts: bool,
        shared: Sequence[nn.Parameter],
    ) -> None:
        """`names`: of all parameters, in the order of the forward pass.  `shared`: those of which the first and the
        last stage hold a copy each.  `update`: of `optimizer`, with the gradients times a scale, and of the working
        weights beside the masters."""
        super().__init__(
            optimizer,
            names,
            # Not for its name: it stops DeepSpeed's own hooks, and it has no other effect.
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=False),
            mpu=mpu,
            dp_process_group=groups.data,
            grad_acc_dtype=torch.float32,
            has_moe_layers=has_experts,
        )
        self.groups, self._update = groups, update
        reduced_over = [groups.data, groups.expert_data] if groups.layout.expert > 1 else [groups.data]
        communicators = {id(group): _another(group) for group in reduced_over}
        place = {id(parameter): i for i, parameter in enumerate(names)}
        buckets = [self._bucket(i, communicators) for i in range(len(self.bf16_groups))]
        self.buckets = sorted(buckets, key=lambda bucket: min(place[id(p)] for p in bucket.parameters))
        """In the order in which the forward pass comes to them."""
        self._shared = [b for b in self.buckets if any(p is tied for p in b.parameters for tied in shared)]
        self._counted = [part for bucket in self.buckets for part in self._counted_parts(bucket)]
        self._leaves_early, self._reduced, self._micro_batches = False, 0, 0
        self._merge_groups()
        for bucket in self.buckets:
            self._sum_gradients(bucket)

    def _bucket(self, i: int, communicators: dict[int, dist.ProcessGroup]) -> Bucket:
        group = self.real_dp_process_group[i]
        return Bucket(
            parameters=self.bf16_groups[i],
            gradient=self.fp32_groups_gradients_flat[i],
            own_gradient=self.fp32_groups_gradient_flat_partition[i],
            working=self.bf16_groups_flat[i],
            own_working=self.bf16_partitioned_groups[i][dist.get_rank(group)],
            master=self.fp32_groups_flat_partition[i],
            group=communicators[id(group)],
        )

    def _merge_groups(self) -> None:
        """Buckets that are updated alike become one group of the inner optimizer: fewer and larger kernels."""
        merged: dict[tuple[float, float], dict[str, Any]] = {}
        for group in self.optimizer.param_groups:
            first = merged.setdefault((group["weight_decay"], group["lr_multiple"]), group)
            if first is not group:
                first["params"] += group["params"]
        self.optimizer.param_groups[:] = merged.values()

    def _counted_parts(self, bucket: Bucket) -> list[Tensor]:
        """What of a bucket's partition is in the norm: of replicas, the first rank's and the first stage's alone."""
        counted = [p for p in bucket.parameters if _is_counted(p, self.groups.tensor.rank())]
        if len(counted) == len(bucket.parameters):
            return [bucket.own_gradient]  # the padding behind them is zero
        mappings = [cast(Any, p)._hp_mapping for p in counted]
        places = [mapping.hp_fragment_address for mapping in mappings if mapping is not None]
        return [bucket.own_gradient.narrow(0, at.start, at.numel) for at in places]

    # Gradients.

    def _sum_gradients(self, bucket: Bucket) -> None:
        """Give each parameter its view of the bucket, and the gradients that autograd makes of it to that."""
        views = bucket.gradient.split([*(p.numel() for p in bucket.parameters), *_padding(bucket)])
        for i, (parameter, view) in enumerate(zip(bucket.parameters, views, strict=False)):
            total = GradientSum(view.view(parameter.shape), after=partial(self._added, bucket, i))
            bucket.sums.append(total)
            give_sum(parameter, total)
        bucket.additions = [0] * len(bucket.sums)

    def start_gradients(self, *, leaves_early: bool, micro_batches: int) -> None:
        """Before the first pass of a step.

        `leaves_early`: every step adds to each parameter as often as the first one of as many micro-batches did, so
        that buckets can leave while passes still run.  Else, and in such a first step, all leave at the end.
        """
        self._leaves_early, self._reduced, self._micro_batches = leaves_early, 0, micro_batches
        for bucket in self.buckets:
            if bucket.reduction is not None:  # of a step that did not end: it still writes what is written next
                bucket.reduction.wait()
            bucket.lacking, bucket.reduction, bucket.has_left = len(bucket.sums), None, False
            bucket.due = bucket.seen.get(micro_batches)
            bucket.additions = [0] * len(bucket.sums)
            for total in bucket.sums:
                total.start()

    @torch.no_grad()
    def _added(self, bucket: Bucket, i: int) -> None:
        if bucket.has_left:
            raise RuntimeError(
                f"{self.param_names[bucket.parameters[i]]} has more gradients in this step than it had in the first of "
                f"{self._micro_batches} micro-batches, and its sum is on its way: this is a bug of the objective or of "
                "the model"
            )
        bucket.additions[i] += 1
        if not self._leaves_early or bucket.due is None or bucket.additions[i] != bucket.due[i]:
            return
        bucket.lacking -= 1
        while self._reduced < len(self.buckets) and self._next_to_leave.lacking == 0:
            self._reduce(self._next_to_leave)

    @property
    def _next_to_leave(self) -> Bucket:
        return self.buckets[-1 - self._reduced]

    def _reduce(self, bucket: Bucket) -> None:
        """Start to sum a bucket over its ranks."""
        self._reduced += 1
        bucket.has_left = True
        if bucket.group.size() == 1:
            return
        if bucket.gradient.is_cuda:
            bucket.reduction = dist.reduce_scatter_tensor(
                bucket.own_gradient, bucket.gradient, group=bucket.group, async_op=True
            )
        else:
            bucket.reduction = dist.all_reduce(bucket.gradient, group=bucket.group, async_op=True)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the last pass, and after every product that was put off: reduce what has not left, await the rest."""
        for bucket in self.buckets:
            bucket.seen.setdefault(self._micro_batches, bucket.additions)
        while self._reduced < len(self.buckets):
            for total in self._next_to_leave.sums:
                total.finish()
            self._reduce(self._next_to_leave)
        for bucket in reversed(self.buckets):
            if bucket.reduction is not None:
                bucket.reduction.wait()
                bucket.reduction = None
        # Behind the reduction: a sum of two is the same number on both stages, so that the copies stay alike.
        for bucket in self._shared:
            dist.all_reduce(bucket.own_gradient, group=self.groups.embedding)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """This rank's summand of the squared norm of the whole gradient, in fp64 on its device."""
        wide = widest(self.groups.device)
        if not self._counted:
            return torch.zeros((), dtype=wide, device=self.groups.device)
        # In fp64: over a million elements the fp32 sum of a CPU is off in the fifth digit.
        norms = torch._foreach_norm(self._counted, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack(norms).square().sum()

    def first_bad_gradient(self) -> str | None:
        """The name of a parameter whose part on this rank is not finite; waits for the device."""
        for bucket in self.buckets:
            for p in bucket.parameters:
                at = cast(Any, p)._hp_mapping
                at = at.hp_fragment_address if at is not None else None
                if at is not None and not bucket.own_gradient.narrow(0, at.start, at.numel).isfinite().all():
                    return self.param_names[p]
        return None

    # The update.

    @torch.no_grad()
    def step(self, closure: None = None, *, lr: float, scale: float = 1.0) -> None:  # type: ignore[override]
        """Update with the gradient times `scale`, and start to gather the weights."""
        assert closure is None
        device = self.groups.device
        lr_there, scale_there = (torch.full((), x, dtype=widest(device), device=device) for x in (lr, scale))
        refused = torch.zeros((), dtype=torch.bool, device=device)
        for bucket in self.buckets:
            bucket.master.grad = bucket.own_gradient
        self.wait_for_weights()
        working = {b.master: b.own_working for b in self.buckets}
        self._update(self.optimizer, lr=lr_there, scale=scale_there, refused=refused, working=working)
        self._gather()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Start to publish the masters; `wait_for_weights` ends it."""
        self.wait_for_weights()
        own, masters = [b.own_working for b in self.buckets], [b.master for b in self.buckets]
        torch._foreach_copy_(own, masters)  # pyright: ignore[reportPrivateImportUsage]
        self._gather()

    def _gather(self) -> None:
        """Start to collect the slices of all ranks, in the order of the forward pass."""
        for bucket in self.buckets:
            if bucket.group.size() > 1:
                # As bytes: gloo knows no bf16.
                whole, part = bucket.working.view(torch.uint8), bucket.own_working.view(torch.uint8)
                bucket.gathering = dist.all_gather_into_tensor(whole, part, group=bucket.group, async_op=True)

    def wait_for_weights(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Until those, or all, are gathered: whoever reads weights outside of a stage's forward pass calls this."""
        for bucket in self.buckets if buckets is None else buckets:
            if bucket.gathering is not None:
                bucket.gathering.wait()
                bucket.gathering = None

    def gather_under(self, stage: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Let forward passes of `stage`, and of its `layers` in order, wait for what they read.

        Weights of no layer are waited for by the stage if they come before its layers, else by its last layer.
        """
        here = {id(parameter) for parameter in stage.parameters()}
        readers = {id(parameter): layer for layer in layers for parameter in layer.parameters()}
        awaited: dict[nn.Module, list[Bucket]] = {}
        latest = stage
        for bucket in (bucket for bucket in self.buckets if id(bucket.parameters[0]) in here):
            latest = readers.get(id(bucket.parameters[0]), latest)
            awaited.setdefault(latest, []).append(bucket)
        assert not layers or latest is layers[-1], "a head is read behind a layer that has no weights"
        for module, buckets in awaited.items():
            module.register_forward_pre_hook(lambda *_, buckets=buckets: self.wait_for_weights(buckets))


def _another(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A communicator of the same ranks.  Collective over all processes."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, tuple(dist.get_process_group_ranks(group)))
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted(set(found))])
    assert isinstance(own, dist.ProcessGroup)
    return own


def _is_counted(parameter: nn.Parameter, tensor_rank: int) -> bool:
    p = cast(Any, parameter)
    return not p.ds_pipe_replicated and (tensor_rank == 0 or p.tensor_model_parallel or is_moe_param(p))


def _padding(bucket: Bucket) -> list[int]:
    rest = bucket.gradient.numel() - sum(p.numel() for p in bucket.parameters)
    return [rest] if rest else []


def make_zero1_engine(
    module: nn.Module,
    groups: Groups,
    mpu: Any,
    config: dict[str, Any],
    *,
    build: Callable[[Any], torch.optim.Optimizer],
    update: Update,
    names: dict[nn.Parameter, str],
    shared: Sequence[nn.Parameter],
) -> DeepSpeedEngine:
    """DeepSpeed's engine over `module`, with `Zero1`; see there.  Collective."""

    class Engine(DeepSpeedEngine):
        # At stage 1 DeepSpeed takes one optimizer for weights in bf16 and another for those in fp32: here both are
        # ours.  Its own `initialize` takes no class of engine, so that what it does for one is done below.
        def _configure_bf16_optimizer(self, optimizer: Any) -> Any:
            return Zero1(optimizer, names, groups, mpu, update=update, has_experts=self.has_moe_layers, shared=shared)

        _configure_zero_optimizer = _configure_bf16_optimizer

    deepspeed_comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return Engine(
        args=None, model=module, optimizer=build, mpu=mpu, config=config, config_class=DeepSpeedConfig(config, mpu)
    )
