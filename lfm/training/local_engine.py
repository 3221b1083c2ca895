"""The engine of one process, which the parallel one is compared with: plain model, fp32 masters, fp32 accumulation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError
from lfm.evaluation.held_out import score
from lfm.kernels.backend import widest
from lfm.kernels.gradient_sum import GradientSum, give_sum
from lfm.layers.liquid import Liquid
from lfm.layers.router import Balance
from lfm.models.global_names import global_views, moving_names
from lfm.models.initialization import initialize, materialize, start_moving
from lfm.models.language_model import Recompute
from lfm.models.losses import Measurements, Objective, combined, weighted
from lfm.models.registry import ModelConfig, build
from lfm.objectives.next_token import NEXT_TOKEN
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
from lfm.training.reservoirs import ReservoirGuard
from lfm.training.router_balance import RouterBalance

_NORM = "gradient norm"


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
    ) -> None:
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
        self.sums = self._gradient_sums()
        self._norm: float | None = None
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
            sums[name] = GradientSum(torch.zeros_like(self.masters[name], requires_grad=False))
            give_sum(parameter, sums[name])
        return sums

    def _start_gradients(self) -> None:
        for name, found in self.sums.items():
            self.masters[name].grad = None  # of a parameter that is its own master autograd would add to it
            found.start()

    def _finish_gradients(self) -> list[Tensor]:
        """The gradients of the step, which the masters then have."""
        for name, found in self.sums.items():
            found.finish()
            self.masters[name].grad = found.total
        return [found.total for found in self.sums.values()]

    def forward_backward(self, batch: Batch) -> StepResult:
        self.model.train()
        self._start_gradients()
        rows, digest = batch.to(self.device), batch.digest()
        counts = rows.documents.counts
        names = [term.name for term in self.terms]
        sums: list[Tensor] = []
        found: list[Measurements] = []
        for start in range(0, len(batch), self.micro_batch_size):
            self._start_micro_batch(start)
            part = rows.slice(start, start + self.micro_batch_size)
            summed = torch.zeros(len(names), dtype=widest(self.device), device=self.device)
            for losses in self.model.loss_parts(part, self.objective, recompute=self.recompute):
                loss = weighted(self.terms, losses.sums, counts)
                (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
                summed += torch.stack([losses.sums[name].detach() for name in names])
                found.append(losses.measure())
            sums.append(summed)
        table, measured = self._read(torch.stack(sums), combined(self.config.measured, found))
        bad = first_bad_micro_batch(table, names, self.micro_batch_size, first=0)
        if bad is not None:
            raise NonFiniteError(bad)
        shown = self._after_backward(measurements(self.config.measured, measured))
        return step_result(self.terms, table.sum(0), counts, rows.documents.attended_pairs, shown, digest)

    def _read(
        self, sums: Tensor, measured: dict[str, tuple[list[int], Tensor]]
    ) -> tuple[Tensor, dict[str, tuple[list[int], Tensor]]]:
        """As `read_back`, with the norm of the step's gradients in the same message: the only one of a step."""
        totals = self._finish_gradients()
        # In fp64: over a million elements the fp32 sum of a CPU is off in the fifth digit.
        norms = torch._foreach_norm(totals, dtype=widest(self.device))  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.stack(norms).norm()
        table, read = read_back(sums, {**measured, _NORM: ([], norm)})
        self._norm = float(read.pop(_NORM)[1])
        return table, read

    @torch.no_grad()
    def step(self, lr: float) -> float:
        assert self._norm is not None, "a step follows its forward_backward"
        unscale = 1.0 if self.loss_scale is None else 1 / self.loss_scale.value
        value, self._norm = unscale * self._norm, None
        if self.loss_scale is not None and not self.loss_scale.after(value):
            return math.inf
        if not math.isfinite(value):
            bad = [name for name, found in self.sums.items() if not found.total.isfinite().all()]
            raise NonFiniteError(f"gradient norm is {value}; first non-finite gradient: {bad[0] if bad else 'none'}")
        # With DeepSpeed's epsilon, which tells only where the norm itself is tiny.
        clip = self.optimizer_config.clip_grad / (value + 1e-6)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]
        scale = unscale * clip if 0 < clip < 1 else unscale
        self.optimizer_config.update(self.optimizer, scale=scale, working=self.working)
        if self._after_update():
            self.publish_masters()
        return value

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
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(value)
