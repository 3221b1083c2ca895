"""The engine of one process, which the parallel one is compared with: plain model, fp32 masters, fp32 accumulation."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.held_out import score
from lfm.kernels.backend import widest
from lfm.kernels.gradient_sum import GradientSum, Together, give_sum
from lfm.kernels.recording import recording
from lfm.layers.documents import UNITS, Counts, Documents, Rows, Unit
from lfm.layers.liquid import Liquid
from lfm.layers.router import Balance
from lfm.models.global_names import global_views, moving_names
from lfm.models.initialization import initialize, materialize, start_moving
from lfm.models.language_model import Recompute
from lfm.models.losses import Measurements, Objective, Table, combined, stacked, weighted
from lfm.models.registry import ModelConfig, build
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.talk import complain
from lfm.training.engine import (
    Engine,
    Read,
    StepResult,
    first_bad_micro_batch,
    measurements,
    read_back,
    step_result,
)
from lfm.training.loss_scale import LossScale
from lfm.training.optimizer.groups import check_groups, found_groups, parameter_groups
from lfm.training.optimizer.kind import OptimizerKind
from lfm.training.recorder import CannotRecord, CudaGraph, FixedRows, Recorder
from lfm.training.reservoirs import ReservoirGuard
from lfm.training.router_balance import RouterBalance

_NORM, _USABLE = "gradient norm", "usable"


class _Numbers:
    """What a step's functions read besides rows: on the device, where a replay finds those of its step."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of losses."""
        self._dtype = dtype
        self._values = torch.ones(len(UNITS) + 2, dtype=widest(device), device=device)
        self.lr, self.loss_scale = self._values[-2], self._values[-1]

    def write(self, counts: Counts, *, lr: float, loss_scale: float) -> None:
        numbers = [*(counts.of(unit) for unit in UNITS), lr, loss_scale]
        given = torch.tensor(numbers, dtype=self._values.dtype)
        if self._values.is_cuda:
            given = given.pin_memory()  # other memory is copied only when the device has nothing else to do
        self._values.copy_(given, non_blocking=True)

    def of(self, unit: Unit) -> Tensor:
        """As `Counts.of`."""
        return self._values[UNITS.index(unit)].to(self._dtype)


@dataclass(frozen=True)
class _Passes:
    """What the forward and backward passes of a micro-batch leave besides gradients."""

    sums: Tensor
    """In the widest dtype `[terms]`."""
    measured: Table

    def copied(self) -> "_Passes":
        return _Passes(self.sums.clone(), {name: (layers, x.clone()) for name, (layers, x) in self.measured.items()})


class LocalEngine(Engine):
    """Working weights in `dtype`; beside those in bf16 or fp16 masters, gradients and optimizer state in fp32.

    With fp16 the loss is scaled, and `step` gives inf where the update was skipped: `lfm.training.loss_scale`.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerKind,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int,
        recompute: Recompute = "none",
        objective: Objective = NEXT_TOKEN,
        initial_loss_scale: float = 2.0**16,
        cuda_graph: CudaGraph = "off",
    ) -> None:
        """cuda_graph: whether `update` replays recorded steps; "required" does so on a CPU too, where a recording is a
        call of the same function."""
        self.config, self.optimizer_config, self.objective, self.seed = model, optimizer, objective, seed
        self.device, self.micro_batch_size, self.rows_a_round = device, micro_batch_size, micro_batch_size
        self.recompute: Recompute = recompute
        self.model = materialize(lambda: build(model), device=device, dtype=dtype)
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype.itemsize > 2 else torch.empty_like(p, dtype=torch.float32, requires_grad=False)
            for name, p in self.model.named_parameters()
        }
        initialize(self.model, seed, self._views(self.masters))
        named = self.model.named_parameters()
        self.working = {self.masters[name]: p for name, p in named if self.masters[name] is not p}
        """By master, the weight that the model works with, where that is another tensor."""
        self.publish_masters()
        self.together = Together()
        self.sums = self._gradient_sums()
        self.numbers = _Numbers(device, torch.promote_types(dtype, torch.float32))
        self.cuda_graph: CudaGraph = cuda_graph
        records = cuda_graph == "required" or (cuda_graph == "auto" and device.type == "cuda")
        self.recorder = Recorder(device, careful=cuda_graph == "auto") if records else None
        self._fixed: dict[Hashable, FixedRows] = {}
        self._told = False
        self._usable = torch.ones((), dtype=torch.bool, device=device)
        """Whether losses of a recorded step are finite and results in it near enough."""
        self._norm: tuple[Tensor, float] | None = None
        self._updates = 0
        groups = parameter_groups(optimizer, self.masters.items(), multiple=model.lr_multiple)
        check_groups(optimizer, [found_groups(optimizer, [*self.masters])])
        self.optimizer = optimizer.build(groups)
        self.optimizer.state.update({master: optimizer.new_state(master) for master in self.masters.values()})
        self.loss_scale = LossScale(initial_loss_scale) if dtype == torch.float16 else None
        self.guards = [ReservoirGuard(model, self.liquids), RouterBalance(model, self.balances)]

    @property
    def liquids(self) -> Mapping[int, Liquid]:
        return self.model.liquids

    @property
    def balances(self) -> Mapping[int, Balance]:
        return self.model.balances

    @property
    def evaluation_modes(self) -> Sequence[str]:
        return self.model.evaluation_modes

    @property
    def evaluation_mode(self) -> str:
        return self.model.evaluation_mode

    def evaluating(self, mode: str) -> AbstractContextManager[None]:
        return self.model.evaluating(mode)

    def start_step(self, step: int, total_steps: int) -> None:
        super().start_step(step, total_steps)
        self.model.start_step(step, total_steps)

    def rows_of_step(self, global_batch_size: int) -> slice:
        return slice(0, global_batch_size)

    def _views(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Global views of `tensors` (by run-time parameter name), buffers included."""
        return global_views(
            self.model, lambda name, tensor: tensors.get(name, None if isinstance(tensor, nn.Parameter) else tensor)
        )

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Copy the masters into the working weights (nothing to do where they are the same tensors)."""
        if self.working:
            torch._foreach_copy_([*self.working.values()], [*self.working])  # pyright: ignore[reportPrivateImportUsage]

    def _gradient_sums(self) -> dict[str, GradientSum]:
        """One for each parameter."""
        sums = {}
        for name, parameter in self.model.named_parameters():
            total = torch.zeros_like(self.masters[name], requires_grad=False)
            sums[name] = GradientSum(total, together=self.together)
            give_sum(parameter, sums[name])
        return sums

    def _start_gradients(self) -> None:
        # A pass that an exception has left, such as a rehearsal that cannot be recorded, may have left some behind.
        self.together.clear()
        for name, found in self.sums.items():
            self.masters[name].grad = None  # of a parameter that is its own master autograd would add to it
            found.start()

    def _finish_gradients(self) -> None:
        """The masters then have the gradients of the step."""
        for name, found in self.sums.items():
            found.finish()
            self.masters[name].grad = found.total

    def forward_backward(self, batch: Batch) -> StepResult:
        rows = batch.to(self.device)
        self._start(rows.documents)
        passes = []
        for start, end in self._micro_batches(batch):
            self._start_micro_batch(start)
            passes.append(self._differentiate(rows.slice(start, end)))
        self._finish_gradients()
        norm = self._gradient_norm()
        digest, (table, read) = batch.digest(), self._read(passes, {_NORM: norm})
        bad = first_bad_micro_batch(table, [term.name for term in self.terms], self.micro_batch_size, first=0)
        if bad is not None:
            raise NonFiniteError(bad)
        self._norm = norm, float(read[_NORM][1])
        return self._result(rows, table, read, digest)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        assert self._norm is not None, "a step follows its forward_backward"
        (norm, on_host), self._norm = self._norm, None
        value = on_host if self.loss_scale is None else on_host / self.loss_scale.value
        if self.loss_scale is not None and not self.loss_scale.after(value):
            return math.inf
        self._require_finite(value)
        self.numbers.lr.fill_(lr)
        self._apply(norm, refused=torch.zeros((), dtype=torch.bool, device=self.device))
        self._count_update()
        return value

    def update(self, batch: Batch, lr: float) -> tuple[StepResult, float]:
        """Where the device can make such a step without the host, it is recorded once and then replayed."""
        found = self._replayed_update(batch, lr) if self._records() else None
        return super().update(batch, lr) if found is None else found

    def _records(self) -> bool:
        if self.recorder is None:
            return False
        obstacle, kind = None, self.optimizer_config.model_dump()["kind"]
        if not self.optimizer_config.waits_for_nothing:
            obstacle = f"the update of optimizer.kind={kind} waits for the device"
        obstacle = obstacle or self.config.needs_host(self.device, self.dtype)
        if obstacle is not None:
            self._tell(obstacle)
        return obstacle is None

    def _tell(self, obstacle: str) -> None:
        """Why steps are not replayed, once; raises UserError where they must be."""
        if self.cuda_graph == "required":
            why = f"a step cannot be recorded, because {obstacle}"
            raise UserError(f"training.cuda_graph=required: {why}; set it to auto")
        if not self._told:
            complain(f"training.cuda_graph=auto: steps are launched kernel by kernel, because {obstacle}")
        self._told = True

    def _replayed_update(self, batch: Batch, lr: float) -> tuple[StepResult, float] | None:
        """As `Engine.update`; None: nothing was updated, and the step is to be made kernel by kernel."""
        assert self.recorder is not None
        try:
            rows = Rows(batch.ids, batch.documents, batch.extras)  # on the host
            self._start(rows.documents, lr)
            passes = []
            for start, end in self._micro_batches(batch):
                self._start_micro_batch(start)
                passes.append(self._replayed_passes(rows.slice(start, end), adds=start > 0))
            self._finish_gradients()
            norm = self.recorder.run("update", self._conclude, may_wait=True)
        except CannotRecord as error:
            self.recorder = None
            self._tell(str(error))
            return None
        # The device is at work: what the host has to do meanwhile does not show.
        digest, (table, read) = batch.digest(), self._read(passes, {_NORM: norm, _USABLE: self._usable})
        if not read[_USABLE][1]:
            return None
        result, value = self._result(rows, table, read, digest), float(read[_NORM][1])
        if self.loss_scale is not None:
            value /= self.loss_scale.value
            if not self.loss_scale.after(value):
                return result, math.inf
        self._require_finite(value)
        self._count_update()
        return result, value

    def _replayed_passes(self, part: Rows, *, adds: bool) -> _Passes:
        """As `_differentiate`, of rows of the host, which are written where a recording reads them."""
        assert self.recorder is not None
        kind = FixedRows.kind(part)
        if kind not in self._fixed:
            self._fixed[kind] = FixedRows(part, self.device)
        rows, sums = self._fixed[kind].load(part), [*self.sums.values()]

        def function() -> tuple[_Passes, list[bool]]:
            with recording() as verdicts:
                found = self._differentiate(rows)
            usable = torch.stack([found.sums.isfinite().all(), *verdicts]).all()
            self._usable.copy_(self._usable & usable if adds else usable)
            return found, [each.is_empty for each in sums]

        warmups = tuple(liquid.warmup for liquid in self.liquids.values())
        found, empty = self.recorder.run((kind, adds, warmups, self.model.evaluation_mode), function)
        for each, is_empty in zip(sums, empty, strict=True):
            each.is_empty = is_empty
        return found.copied()  # the next replay writes over it

    def _conclude(self) -> Tensor:
        """Clip and update, if losses and norm are finite and results were near enough; the norm."""
        norm = self._gradient_norm()
        self._apply(norm, refused=~(norm.isfinite() & self._usable))
        return norm

    @torch.no_grad()
    def _start(self, documents: Documents, lr: float = 0.0) -> None:
        """Begin a step: its numbers go to the device."""
        if not self.model.training:
            self.model.train()
        self._start_gradients()
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        self.numbers.write(documents.counts, lr=lr, loss_scale=scale)

    def _micro_batches(self, batch: Batch) -> list[tuple[int, int]]:
        """First row and end of each."""
        size = self.micro_batch_size
        return [(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]

    def _differentiate(self, part: Rows) -> _Passes:
        """Forward and backward of a micro-batch, whose gradients are added up."""
        names = [term.name for term in self.terms]
        found: list[Measurements] = []
        summed = torch.zeros(len(names), dtype=widest(self.device), device=self.device)
        for losses in self.model.loss_parts(part, self.objective, recompute=self.recompute):
            loss = weighted(self.terms, losses.sums, self.numbers)
            (loss if self.loss_scale is None else loss * self.numbers.loss_scale).backward()
            self.together.add()
            summed += torch.stack([losses.sums[name].detach() for name in names])
            found.append(losses.measure())
        return _Passes(summed, stacked(self.config.measured, found))

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        # In fp64: over a million elements the fp32 sum of a CPU is off in the fifth digit.
        totals = [found.total for found in self.sums.values()]
        norms = torch._foreach_norm(totals, dtype=widest(self.device))  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack(norms).norm()

    @torch.no_grad()
    def _apply(self, norm: Tensor, *, refused: Tensor) -> None:
        """Clip gradients of this norm, and update with them unless `refused`."""
        unscale = 1 / self.numbers.loss_scale
        # With DeepSpeed's epsilon, which tells only where the norm itself is tiny.
        clip = self.optimizer_config.clip_grad / (unscale * norm + 1e-6)
        scale = torch.where((clip > 0) & (clip < 1), unscale * clip, unscale)
        how = {"lr": self.numbers.lr, "scale": scale, "refused": refused, "working": self.working}
        self.optimizer_config.update(self.optimizer, **how)

    def _read(self, passes: Sequence[_Passes], more: Mapping[str, Tensor]) -> tuple[Tensor, Table]:
        """The sums of each micro-batch, and what all measured and single numbers: the only message of a step."""
        measured = combined(self.config.measured, [each.measured for each in passes])
        single = {name: ([], number) for name, number in more.items()}
        return read_back(torch.stack([each.sums for each in passes]), {**measured, **single})

    def _result(self, rows: Rows, table: Tensor, read: Table, digest: int) -> StepResult:
        shown = self._after_backward(measurements(self.config.measured, read))
        documents = rows.documents
        return step_result(self.terms, table.sum(0), documents.counts, documents.attended_pairs, shown, digest)

    def _require_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            bad = [name for name, found in self.sums.items() if not found.total.isfinite().all()]
            raise NonFiniteError(f"gradient norm is {norm}; first non-finite gradient: {bad[0] if bad else 'none'}")

    def _count_update(self) -> None:
        self._updates += 1
        if self._after_update():
            self.publish_masters()

    def record(self) -> dict[str, Any]:
        return super().record() | (self.loss_scale.record() if self.loss_scale is not None else {})

    def state_values(self) -> dict[str, Any]:
        return super().state_values() | (self.loss_scale.state() if self.loss_scale is not None else {})

    def load_state_values(self, counters: dict[str, Any]) -> None:
        super().load_state_values(counters)
        if self.loss_scale is not None:
            self.loss_scale.load(counters)

    def master_of(self, parameter: Tensor) -> Tensor:
        return next(self.masters[name] for name, p in self.model.named_parameters() if p is parameter)

    def scale_master(self, parameter: Tensor, factors: Tensor) -> None:
        self.master_of(parameter).mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embedding.weight.dtype

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        return score(self.model, batch)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint stores as tensors, by layout-free key; views, so that loading fills them in place."""
        buffers, moving = self._views({}), moving_names(self.model)
        found = {f"{'moving' if name in moving else 'frozen'}.{name}": tensor for name, tensor in buffers.items()}
        for key in self.optimizer_config.state_keys:
            kept = {name: self.optimizer.state[master][key] for name, master in self.masters.items()}
            found |= {f"{key}.{n}": t for n, t in self._views(kept).items() if n not in buffers}
        return {**found, **{f"master.{n}": t for n, t in self._views(self.masters).items() if n not in buffers}}

    def state_tensors(self) -> Mapping[str, Tensor]:
        return {key: tensor.clone() if key.startswith("moving.") else tensor for key, tensor in self.tensors().items()}

    def load_state_tensors(self, read: Read, kinds: Iterable[str] | None = None) -> None:
        chosen = tuple(f"{kind}." for kind in kinds or self.state_kinds)
        if "moving." in chosen:
            start_moving(self.model)
        read({key: tensor for key, tensor in self.tensors().items() if key.startswith(chosen)})
        self.publish_masters()

    @property
    def optimizer_step(self) -> int:
        return self._updates

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        self._updates = value
        for state in self.optimizer.state.values():
            state["step"].fill_(value)
