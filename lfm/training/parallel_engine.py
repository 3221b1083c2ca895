"""The parallel engine: megatron-core's schedule fills gradients of the plain model's pieces, DeepSpeed ZeRO updates.

Same losses, gradients and updates as the local engine, under any layout that `lfm.layout.layout` calls legal.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError
from lfm.layers.documents import Counts, Documents, Rows
from lfm.layers.liquid import Liquid
from lfm.layers.router import Balance
from lfm.models.decoder import Decoder
from lfm.models.global_names import moving_names
from lfm.models.initialization import materialize, start_moving
from lfm.models.language_model import LanguageModel, Recompute
from lfm.models.losses import Measured, Objective, Term, combined, stacked
from lfm.models.registry import ModelConfig, build
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.parallel.global_parts import copy_own_slice, global_parts
from lfm.parallel.groups import Groups
from lfm.parallel.megatron import MegatronParts, transformer_config
from lfm.parallel.stage import make_stage, run_schedule
from lfm.parallel.transfers import Transfers
from lfm.parallel.zero import (
    EngineAsModule,
    Fragment,
    Weight,
    fragments,
    inner_optimizer,
    make_engine,
    publish_masters,
)
from lfm.parallel.zero1 import Zero1
from lfm.training.engine import Engine, Read, StepResult, first_bad_micro_batch, measurements, on_host, step_result
from lfm.training.optimizer.groups import check_groups, found_groups, parameter_groups, split_groups
from lfm.training.optimizer.kind import Group, OptimizerKind
from lfm.training.reservoirs import ReservoirGuard
from lfm.training.router_balance import RouterBalance

_BATCH_BYTES = 2**30
"""Host memory for tensors on their way from a checkpoint into the partitions."""
_PIECES = (0, 16, 32, 48)


class ParallelEngine(Engine):
    """One process of a run over `groups`.  `phase` is told what the process is about to do."""

    state_tensors_are_fresh = True
    make_parts = MegatronParts

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerKind,
        groups: Groups,
        *,
        seed: int,
        dtype: torch.dtype,
        micro_batch_size: int,
        recompute: Recompute = "none",
        objective: Objective = NEXT_TOKEN,
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.config, self.objective, self.groups, self.layout = model, objective, groups, groups.layout
        self.optimizer_config = optimizer
        self.device, self.dtype, self.micro_batch_size = groups.device, dtype, micro_batch_size
        self.phase, self.seed = phase, seed
        # Enough micro-batches to fill the pipeline twice.
        fill = 2 * self.layout.pipeline if self.layout.pipeline > 1 else 1
        self.rows_a_round = micro_batch_size * self.layout.data * fill
        config = transformer_config(model, self.layout, dtype)
        parts = self.make_parts(groups, config)
        self.pieces = [
            materialize(lambda: build(model, parts, layers), device=self.device, dtype=dtype)  # noqa: B023
            for layers in self.layout.stage_chunks(groups.pipeline.rank())
        ]
        interleaved = len(self.pieces) > 1
        self.stages = [
            make_stage(piece, config, virtual_stage=i if interleaved else None, recompute=recompute)
            for i, piece in enumerate(self.pieces)
        ]
        # By run-time name of a parameter or buffer; now, while shapes are whole.
        self.global_parts = global_parts(self.pieces, groups)
        self.weights = [weight for piece in self.pieces for weight in self._weights(piece)]
        parameter_groups = self._parameter_groups()
        self.deepspeed = make_engine(
            nn.ModuleList(self.stages) if interleaved else self.stages[0],
            self.weights,
            groups,
            build=lambda: optimizer.build(parameter_groups, fused=not self.layout.offload_optimizer),
            update=optimizer.update,
            new_state=optimizer.new_state,
            clip_grad=optimizer.clip_grad,
            micro_batch_size=micro_batch_size,
        )
        self.zero1 = self.deepspeed.optimizer if self.layout.zero_stage == 1 else None
        self.fragments = fragments(self.deepspeed, self.weights)
        self._updates, self._norm = 0, 0.0
        # Stages hand gradients to ZeRO themselves from stage 2 on: then each pass goes through its engine.
        through_engine = self.layout.zero_stage > 1
        self.scheduled: list[nn.Module] = (
            [EngineAsModule(self.deepspeed, self.stages[0])] if through_engine else [*self.stages]
        )
        if self.zero1 is not None:
            for stage in self.stages:
                self.zero1.gather_under(stage, stage.layers)
        self.transfers = Transfers(groups, config) if self.layout.pipeline > 1 else None
        # What waits keeps its inputs, which recomputing is there to drop; a tied embedding's gradient leaves for the
        # other stage.
        if self.transfers is not None and recompute == "none":
            self.transfers.delay(w.parameter for w in self.weights if not w.name.startswith("embedding."))
        speaks = groups.data.rank() == 0 and groups.tensor.rank() == 0
        self.guards = [
            ReservoirGuard(model, self.liquids, speaks=speaks),
            RouterBalance(model, self.balances, speaks=speaks),
        ]
        self._host: dict[str, Tensor] = {}
        self._start_moving()
        self.load_state_tensors(lambda targets: self._initialize(targets, seed), kinds=("master", "frozen"))

    # What each process holds, by global name.

    def _weights(self, piece: LanguageModel) -> list[Weight]:
        tied_copy = isinstance(piece, Decoder) and not piece.is_first and self.config.is_tied
        return [
            Weight(
                name=name,
                parameter=parameter,
                is_expert=self.layout.expert > 1 and self.global_parts[name][0].expert,
                is_cut=self.global_parts[name][0].cut is not None,
                is_copy=tied_copy and name == "embedding.weight",
                is_wide=parameter.dtype != self.dtype,
                is_shared=self.config.is_tied and name == "embedding.weight" and self.groups.embedding is not None,
            )
            for name, parameter in piece.named_parameters()
        ]

    def _parameter_groups(self) -> list[Group]:
        """Collective; raises UserError on all processes."""
        config, named = self.optimizer_config, ((w.name, w.parameter) for w in self.weights)
        experts, wide = ({w.name for w in self.weights if of(w)} for of in (lambda w: w.is_expert, lambda w: w.is_wide))
        multiple = self.config.lr_multiple
        groups = parameter_groups(config, named, multiple=multiple, experts=experts, wide=wide)
        found: list[Any] = [None] * self.layout.world
        dist.all_gather_object(found, found_groups(config, [w.name for w in self.weights]))
        check_groups(config, found)
        return split_groups(groups, self._bucket) if self.layout.zero_stage == 1 else groups

    def _bucket(self, name: str) -> str:
        """What is reduced and gathered together: the weights of a layer, its experts, what is in no layer."""
        place = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        return f"{place} experts" if self.global_parts[name][0].expert else place

    def buffers(self, kinds: Iterable[str] = ("moving", "frozen")) -> dict[str, Tensor]:
        """Views of this process's buffers by checkpoint key."""
        found = {}
        for piece in self.pieces:
            moving = moving_names(piece)
            for name, buffer in piece.named_buffers():
                kind = "moving" if name in moving else "frozen"
                if kind in kinds:
                    found |= {f"{kind}.{part.name}": part.of(buffer) for part in self.global_parts[name]}
        return found

    def _start_moving(self) -> None:
        for piece in self.pieces:
            start_moving(piece)

    def _data_group(self, weight: Weight) -> dist.ProcessGroup:
        return self.groups.expert_data if weight.is_expert else self.groups.data

    def _initialize(self, targets: Mapping[str, Tensor], seed: int) -> None:
        """Initial values, each tensor drawn whole and cut, so that all layouts start alike; several at a time."""

        def draw(key: str) -> None:
            target = targets[key]
            whole = self.pieces[0].initial_tensor(key.partition(".")[2], target.shape, seed)
            copy_own_slice(target, whole)

        # The launchers give each process one thread; each tensor's generator is its own.
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // self.layout.world)) as pool:
            list(pool.map(draw, targets))

    @torch.no_grad()
    def load_state_tensors(self, read: Read, kinds: Iterable[str] | None = None) -> None:
        kinds, parts = tuple(kinds or self.state_kinds), self.global_parts
        state = inner_optimizer(self.deepspeed).state
        batch: list[tuple[Fragment, str, Tensor]] = []
        targets: dict[str, Tensor] = {}

        def flush() -> None:
            read(targets)
            for fragment, kind, whole in batch:
                of = fragment.flat if kind == "master" else state[fragment.flat][kind]
                fragment.view(of).copy_(whole.flatten()[fragment.start : fragment.start + fragment.numel])
            batch.clear()
            targets.clear()

        for weight in self.weights:
            fragment = self.fragments[weight.name]
            for kind in ("master", *self.optimizer_config.state_keys):
                if fragment is None or kind not in kinds:
                    continue
                whole = torch.empty(self._shape(weight), dtype=torch.float32)
                batch.append((fragment, kind, whole))
                targets |= {
                    f"{kind}.{part.name}": part.as_global(whole, self.groups.tensor) for part in parts[weight.name]
                }
            if sum(whole.numel() * 4 for _, _, whole in batch) > _BATCH_BYTES:
                flush()
        if "moving" in kinds:
            self._start_moving()
        targets |= self.buffers(kinds)
        flush()
        publish_masters(self.deepspeed, self.weights, self.fragments)

    @torch.no_grad()
    def state_tensors(self) -> Mapping[str, Tensor]:
        """In host memory that the next call uses again: fresh memory takes several times as long to fill.

        The processes of a data-parallel group each give some of their common weights.
        """
        state, parts, found = inner_optimizer(self.deepspeed).state, self.global_parts, {}
        given = {id(group): [0] * group.size() for group in (self.groups.data, self.groups.expert_data)}
        for weight in self.weights:
            group = self._data_group(weight)
            sizes, shape = given[id(group)], self._shape(weight)
            owner = sizes.index(min(sizes))
            sizes[owner] += shape.numel()
            whole_here = not weight.is_cut and not weight.is_expert
            given_elsewhere = weight.is_copy or (whole_here and self.groups.tensor.rank() > 0)
            for kind in ("master", *self.optimizer_config.state_keys):
                pick = (lambda flat: flat) if kind == "master" else (lambda flat, kind=kind: state[flat][kind])
                whole = self._gathered(weight, pick)
                if owner != group.rank() or given_elsewhere:
                    continue
                key = f"{kind}.{weight.name}"
                if key not in self._host:
                    self._host[key] = torch.empty(shape, dtype=torch.float32)
                self._host[key].copy_(whole)
                found |= {
                    f"{kind}.{p.name}": p.as_global(self._host[key], self.groups.tensor) for p in parts[weight.name]
                }
        if self.groups.data.rank() == 0 and self.groups.tensor.rank() == 0:
            found |= {key: buffer.cpu() for key, buffer in self.buffers(["frozen"]).items()}
            # Copies: training moves them while a save is under way.
            found |= {key: buffer.cpu().clone() for key, buffer in self.buffers(["moving"]).items()}
        return found

    def _shape(self, weight: Weight) -> torch.Size:
        """The parameter's own shape; ZeRO-3 leaves an empty one in its place."""
        return torch.Size(getattr(weight.parameter, "ds_shape", weight.parameter.shape))

    def _gathered(self, weight: Weight, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """fp32 tensor of a weight's local shape from its fragments; `pick` gives the flat tensor beside `flat`."""
        shape, fragment = self._shape(weight), self.fragments[weight.name]
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
        if fragment is not None:
            part = whole[fragment.start : fragment.start + fragment.numel]
            part.copy_(fragment.view(pick(fragment.flat)))
        dist.all_reduce(whole, group=self._data_group(weight))
        return whole.view(shape)

    # One optimizer step.

    def rows_of_step(self, global_batch_size: int) -> slice:
        rows = global_batch_size // self.layout.data
        return slice(self.groups.data.rank() * rows, (self.groups.data.rank() + 1) * rows)

    def forward_backward(self, batch: Batch) -> StepResult:
        micro_batches, documents = self._micro_batches(batch)
        counts = self._over_data(documents.counts)
        # `Zero1` sums over processes, DeepSpeed's own optimizers take the mean.
        divisor = self.layout.data if self.zero1 is None else 1
        for stage in self.stages:
            stage.begin(self.objective, counts, divisor=divisor, micro_batches=len(micro_batches))
        if self.zero1 is not None:
            early = self.config.row_is_one_pass
            self.zero1.start_gradients(leaves_early=early, micro_batches=len(micro_batches))
        digest = batch.digest(first=self.rows_of_step(len(batch) * self.layout.data).start)
        self._run(micro_batches, forward_only=False)
        if self.zero1 is not None:
            self.zero1.finish_gradients()
        return self._result(documents, digest)

    def _micro_batches(self, batch: Batch) -> tuple[list[Rows], Documents]:
        rows = batch.to(self.device)
        starts = range(0, len(batch), self.micro_batch_size)
        return [rows.slice(start, start + self.micro_batch_size) for start in starts], rows.documents

    def _run(self, micro_batches: Sequence[Rows], *, forward_only: bool) -> None:
        first = self.groups.data.rank() * len(micro_batches) * self.micro_batch_size

        def on_micro_batch(index: int) -> None:
            self.phase(f"micro-batch {index + 1} of {len(micro_batches)}")
            if not forward_only:
                self._start_micro_batch(first + index * self.micro_batch_size)

        run_schedule(
            self.scheduled,
            micro_batches,
            transfers=self.transfers,
            seq_length=self.config.seq_length,
            forward_only=forward_only,
            on_micro_batch=on_micro_batch,
        )

    def _over_data(self, counts: Counts) -> Tensor:
        """Labels, rows and documents of the whole step, on the device, for which no one waits."""
        total = torch.tensor([counts.labels, counts.rows, counts.documents]).to(self.device, non_blocking=True)
        dist.all_reduce(total, group=self.groups.data)
        return total

    def _result(self, documents: Documents, digest: int) -> StepResult:
        """The one wait for the device of a step: losses, counts, what was measured, and the norm."""
        self.phase("sums over all processes")
        measured = self.config.measured
        of_stages = [losses.measure() for stage in self.stages for losses in stage.losses]
        found = combined(measured, [stacked(measured, of_stages)])
        table = self._loss_table(self.terms)
        whole = {measure.name: _whole(measure, found.get(measure.name), self.device) for measure in measured}
        largest = {measure.name: whole[measure.name] for measure in measured if measure.over == "max"}
        largest["bad"] = (~table.isfinite().all()).double()
        # Of the host, in pieces of 16 bits, which a sum of doubles keeps exactly.
        counts, pieces = documents.counts, [digest >> bits & 0xFFFF for bits in _PIECES]
        known = [counts.labels, counts.rows, counts.documents, documents.attended_pairs, *pieces]
        known = torch.tensor(known, dtype=torch.float64).to(self.device, non_blocking=True)
        # Tensor-parallel processes have the same of everything, stages the same rows: one of them counts.
        sums = {"terms": table.double().sum(0), "known": known * (self.groups.pipeline.rank() == 0)}
        for measure in measured:
            if measure.over != "max":
                sums[measure.name] = whole[measure.name] / (self.layout.data if measure.over == "mean" else 1)
        mine = self.groups.tensor.rank() == 0
        sums = {name: value * mine for name, value in sums.items()}
        if self.zero1 is not None:
            sums["squared_norm"] = self.zero1.squared_norm()
        largest, sums = self._over_all(largest, sums)
        if largest.pop("bad"):
            first = self.groups.data.rank() * len(table) * self.micro_batch_size
            names = [term.name for term in self.terms]
            self._refuse(first_bad_micro_batch(table, names, self.micro_batch_size, first=first))
        if self.zero1 is not None:
            self._norm = float(sums["squared_norm"].sqrt())
        over_all = {m.name: (list(m.layers), (largest if m.over == "max" else sums)[m.name]) for m in measured}
        shown = self._after_backward(measurements(measured, over_all))
        labels, rows, num_documents, pairs, *pieces = (int(number) for number in sums["known"].tolist())
        digest = sum(piece << bits for piece, bits in zip(pieces, _PIECES, strict=True)) % 2**64
        return step_result(self.terms, sums["terms"], Counts(labels, rows, num_documents), pairs, shown, digest)

    def _over_all(
        self, largest: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Small tensors of the device reduced over all processes, on the host in fp64, by one message to it."""
        reduced: list[dict[str, Tensor]] = []
        for named, operation in ((largest, dist.ReduceOp.MAX), (sums, dist.ReduceOp.SUM)):
            message = torch.cat([tensor.double().flatten() for tensor in named.values()])
            dist.all_reduce(message, op=operation)
            pieces = message.split([tensor.numel() for tensor in named.values()])
            reduced.append({n: piece.view(t.shape) for (n, t), piece in zip(named.items(), pieces, strict=True)})
        host = on_host(**{f"{i}{name}": t for i, named in enumerate(reduced) for name, t in named.items()})
        over_largest, over_sums = ({name: host[f"{i}{name}"] for name in named} for i, named in enumerate(reduced))
        return over_largest, over_sums

    def _loss_table(self, terms: Sequence[Term]) -> Tensor:
        """`[micro-batches, terms]`: sums of this process's chunks, 0 for terms of others."""
        zero = torch.zeros((), device=self.device)
        chunks = [
            torch.stack([torch.stack([losses.sums.get(t.name, zero) for t in terms]) for losses in stage.losses])
            for stage in self.stages
        ]
        return torch.stack(chunks).sum(0)

    def _refuse(self, bad: str | None) -> None:
        """Raise the lowest-ranked process's finding, alike everywhere."""
        found: list[str | None] = [None] * self.layout.world
        dist.all_gather_object(found, bad)
        rank, text = next((rank, text) for rank, text in enumerate(found) if text is not None)
        raise NonFiniteError(f"rank {rank}: {text}")

    def step(self, lr: float) -> float:
        self.phase("optimizer step")
        for group in inner_optimizer(self.deepspeed).param_groups:
            group["lr"] = lr * group["lr_multiple"]
        norm = self._step_of_deepspeed() if self.zero1 is None else self._step_of_zero1(self.zero1, lr)
        self._updates += 1
        if self._after_update():
            publish_masters(self.deepspeed, self.weights, self.fragments)
        return norm

    def _step_of_zero1(self, zero1: Zero1, lr: float) -> float:
        norm = self._norm
        if not math.isfinite(norm):
            bad = zero1.first_bad_gradient()
            self._refuse(bad and f"gradient norm is not finite ({norm}); first non-finite gradient: {bad}")
        # With DeepSpeed's epsilon, which tells only where the norm itself is tiny.
        clip = self.optimizer_config.clip_grad / (norm + 1e-6)
        zero1.step(lr=lr, scale=clip if 0 < clip < 1 else 1.0)
        return norm

    def _step_of_deepspeed(self) -> float:
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        if self.deepspeed.optimizer.overflow or not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is not finite ({norm})")
        return norm

    @torch.no_grad()
    def master_of(self, parameter: Tensor) -> Tensor:
        return self._gathered(self._weight_of(parameter), lambda flat: flat)

    @torch.no_grad()
    def scale_master(self, parameter: Tensor, factors: Tensor) -> None:
        weight = self._weight_of(parameter)
        fragment, shape = self.fragments[weight.name], self._shape(weight)
        if fragment is not None:
            each = factors.repeat_interleave(shape.numel() // len(factors))
            part = each[fragment.start : fragment.start + fragment.numel]
            fragment.view(fragment.flat).mul_(part.to(fragment.flat.device))

    def _weight_of(self, parameter: Tensor) -> Weight:
        return next(weight for weight in self.weights if weight.parameter is parameter)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Rows are dealt to the data-parallel processes; rows without labels fill the last round."""
        layout = self.layout
        a_round = self.micro_batch_size * layout.data * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
        batch = batch.filled(-len(batch) % a_round)
        micro_batches, documents = self._micro_batches(batch[self.rows_of_step(len(batch))])
        for stage in self.stages:
            stage.begin(NEXT_TOKEN, None)
        self._run(micro_batches, forward_only=True)
        nats = self._loss_table(NEXT_TOKEN.terms).sum().double() * (self.groups.tensor.rank() == 0)
        found = torch.stack([nats, torch.tensor(float(documents.num_labels), device=self.device).double()])
        found[1] *= self.groups.tensor.rank() == 0 and self.groups.pipeline.rank() == 0
        dist.all_reduce(found)
        total, labels = found.tolist()
        return total, int(labels)

    @property
    def liquids(self) -> Mapping[int, Liquid]:
        return {layer: liquid for piece in self.pieces for layer, liquid in piece.liquids.items()}

    @property
    def balances(self) -> Mapping[int, Balance]:
        return {layer: balance for piece in self.pieces for layer, balance in piece.balances.items()}

    @property
    def evaluation_modes(self) -> Sequence[str]:
        return self.pieces[0].evaluation_modes

    @property
    def evaluation_mode(self) -> str:
        return self.pieces[0].evaluation_mode

    @contextmanager
    def evaluating(self, mode: str) -> Iterator[None]:
        with ExitStack() as stack:
            for piece in self.pieces:
                stack.enter_context(piece.evaluating(mode))
            yield

    def start_step(self, step: int, total_steps: int) -> None:
        super().start_step(step, total_steps)
        for piece in self.pieces:
            piece.start_step(step, total_steps)

    @property
    def optimizer_step(self) -> int:
        # Counted on the host: to read the optimizer's own count is to wait for the device.
        return self._updates

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        self._updates = value
        for state in inner_optimizer(self.deepspeed).state.values():
            state["step"].fill_(value)


def _whole(measure: Measured, here: tuple[list[int], Tensor] | None, device: torch.device) -> Tensor:
    """fp64 `[all layers of it, width]`, 0 for those that other processes hold."""
    table = torch.zeros(len(measure.layers), measure.width, dtype=torch.float64, device=device)
    if here is not None:
        layers, values = here
        rows = torch.tensor([measure.layers.index(layer) for layer in layers]).to(device, non_blocking=True)
        table.index_copy_(0, rows, values.double())
    return table
