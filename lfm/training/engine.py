"""Engines turn rows into updates.  The local one: one process, plain model, fp32 masters and gradient accumulation.

It is the truth that the parallel engine is compared with.
"""

import abc
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.kernels.accumulation import accumulate_
from lfm.layers.documents import Counts
from lfm.layers.liquid import Liquid
from lfm.models.global_names import global_views
from lfm.models.language_model import LanguageModel, Recompute, initialize
from lfm.models.losses import Measured, Measurements, Objective, Term, combined, weighted
from lfm.models.registry import ModelConfig, build
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.training.evaluate import score
from lfm.training.guards import Guard
from lfm.training.optimizer import OptimizerConfig, adamw
from lfm.training.reservoirs import ReservoirGuard


@dataclass
class StepResult:
    """One optimizer step's losses (means over its labels, rows and layers) and measurements, on the host."""

    loss: float
    """The weighted sum of the terms: what is differentiated."""
    terms: dict[str, float]
    """Means over the labels, rows or documents of the step, by name, the objective's first; `cross_entropy` in nats."""
    counts: Counts
    attended_pairs: int
    measured: dict[str, dict[int, Any]]
    """By name and layer: a number, or a list of numbers where a layer has several."""
    digest: int
    """`Batch.digest` of all rows of the step, of the tensors that the model was given."""


Read = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors (plain ones or DTensors), given by checkpoint key, in place."""

STATE = ("master", "exp_avg", "exp_avg_sq", "frozen")
"""What a checkpoint holds of an engine: keys are these, a dot, and a global name."""


class Engine(abc.ABC):
    """What the training loop drives.  Every method is called on every process of the run, in the same order."""

    config: Any
    """Of the model's family."""
    objective: Objective
    device: torch.device
    guards: Sequence[Guard]
    """In the order in which they act."""
    share_is_fresh = False
    """Whether `share` returns copies, which later steps leave alone and the next `share` writes over."""

    rows_a_round: int
    """Rows that one round of `evaluate` takes without filling up."""

    @abc.abstractmethod
    def rows_of_step(self, global_batch_size: int) -> slice:
        """Which rows of each optimizer step this process wants."""

    @abc.abstractmethod
    def forward_backward(self, batch: Batch) -> StepResult:
        """Gradients of one optimizer step, from this process's rows of it.

        Each term is summed and divided by the labels, rows or documents of the whole step: neither micro-batches nor
        processes matter.  Raises NonFiniteError naming the rows of the first bad micro-batch.
        """

    @abc.abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update, publish; returns the norm of the whole gradient before clipping.

        Raises NonFiniteError, without an update, when that norm is not finite.
        """

    @abc.abstractmethod
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(sum of cross entropy in nats, number of labels) of rows, dropless; all give all rows."""

    @abc.abstractmethod
    def share(self) -> Mapping[str, Tensor]:
        """This process's part of a checkpoint, by key; a DTensor where it has a slice of the whole."""

    @abc.abstractmethod
    def fill(self, read: Read, kinds: Iterable[str] = STATE) -> None:
        """Take the named kinds of state from a checkpoint of any engine and layout."""

    @property
    @abc.abstractmethod
    def optimizer_step(self) -> int:
        """Updates that the moments have seen."""

    @optimizer_step.setter
    @abc.abstractmethod
    def optimizer_step(self, value: int) -> None: ...

    @property
    @abc.abstractmethod
    def liquids(self) -> Mapping[int, Liquid]:
        """Liquid layers of this process by layer number."""

    @property
    def evaluation_modes(self) -> Sequence[str]:
        """Ways to run the same weights that every validation tells apart."""
        return ()

    @property
    def evaluation_mode(self) -> str:
        """Which of them training uses now."""
        return ""

    def evaluating(self, mode: str) -> AbstractContextManager[None]:
        """Within it `evaluate` runs in one of `evaluation_modes`."""
        assert not mode, mode
        return nullcontext()

    def start_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (0-based) of a run of `total_steps`: phases of training switch here."""
        assert 0 <= step < total_steps

    def counters(self) -> dict[str, Any]:
        """Everything else of the engine's state, as JSON values."""
        found: dict[str, Any] = {"optimizer_step": self.optimizer_step}
        for guard in self.guards:
            found |= guard.state()
        return found

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore `counters()`."""
        self.optimizer_step = counters["optimizer_step"]
        for guard in self.guards:
            guard.load(counters)

    @abc.abstractmethod
    def master_of(self, parameter: Tensor) -> Tensor:
        """The fp32 master of one of this process's parameters, in its run-time shape.  Collective."""

    @abc.abstractmethod
    def scale_master(self, parameter: Tensor, factors: Tensor) -> None:
        """Multiply what this process keeps of a parameter's master: a factor for each index of its first dimension."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """All summands of the loss, the objective's first."""
        return (*self.objective.terms, *self.config.terms)

    def _after_backward(self, measured: Mapping[str, Mapping[int, Any]]) -> None:
        for guard in self.guards:
            guard.after_backward(measured)

    def _after_update(self) -> bool:
        """Whether a guard changed a master."""
        return any([guard.after_update(self.optimizer_step, self) for guard in self.guards])

    def memory_bytes(self) -> int:
        """Peak memory: the device's allocator on a GPU, the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronize(self) -> float:
        """Wait for the device; the time, in seconds, of a monotonic clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class LocalEngine(Engine):
    """Working weights in `dtype`; when that is bf16, fp32 masters, fp32 gradients and fp32 moments beside them."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int,
        recompute: Recompute = "none",
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        self.config, self.optimizer_config, self.objective = model, optimizer, objective
        self.device, self.micro_batch_size, self.rows_a_round = device, micro_batch_size, micro_batch_size
        self.recompute: Recompute = recompute
        self.model = materialize(lambda: build(model), device=device, dtype=dtype)
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype != torch.bfloat16 else torch.empty_like(p, dtype=torch.float32, requires_grad=False)
            for name, p in self.model.named_parameters()
        }
        initialize(self.model, seed, self._views(self.masters))
        self.publish_masters()
        self._accumulate_in_fp32()
        self.optimizer = adamw(optimizer, self.masters.items())
        self.guards = [ReservoirGuard(model, self.liquids)]

    @property
    def liquids(self) -> Mapping[int, Liquid]:
        return self.model.liquids

    @property
    def evaluation_modes(self) -> Sequence[str]:
        return self.model.evaluation_modes

    @property
    def evaluation_mode(self) -> str:
        return self.model.evaluation_mode

    def evaluating(self, mode: str) -> AbstractContextManager[None]:
        return self.model.evaluating(mode)

    def start_step(self, step: int, total_steps: int) -> None:
        self.model.start_step(step, total_steps)

    def rows_of_step(self, global_batch_size: int) -> slice:
        return slice(0, global_batch_size)

    def _views(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Global views of `tensors` (by run-time parameter name), frozen buffers included."""
        return global_views(
            self.model, lambda name, tensor: tensors.get(name, None if isinstance(tensor, nn.Parameter) else tensor)
        )

    def publish_masters(self) -> None:
        """Copy the masters into the working weights (nothing to do where they are the same tensors)."""
        named = dict(self.model.named_parameters())
        copies = [name for name, parameter in named.items() if self.masters[name] is not parameter]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [named[name] for name in copies], [self.masters[name] for name in copies]
                )

    def _accumulate_in_fp32(self) -> None:
        """Add each micro-batch's gradient to its master's fp32 one as soon as it is made, and free it."""
        for name, parameter in self.model.named_parameters():
            master = self.masters[name]
            if master is parameter:
                continue
            master.grad = torch.zeros_like(master)

            def accumulate(parameter: Tensor, total: Tensor = master.grad) -> None:
                assert parameter.grad is not None
                accumulate_(total, parameter.grad)
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(accumulate)

    def forward_backward(self, batch: Batch) -> StepResult:
        self.model.train()
        rows, digest = batch.to(self.device), batch.digest()
        counts = rows.documents.counts
        names = [term.name for term in self.terms]
        sums: list[Tensor] = []
        found: list[Measurements] = []
        for start in range(0, len(batch), self.micro_batch_size):
            part = rows.slice(start, start + self.micro_batch_size)
            summed = torch.zeros(len(names), dtype=torch.float64, device=self.device)
            for losses in self.model.loss_parts(part, self.objective, recompute=self.recompute):
                weighted(self.terms, losses.sums, counts).backward()
                summed += torch.stack([losses.sums[name].detach() for name in names])
                found.append(losses.measure())
            sums.append(summed)
        table, measured = read_back(torch.stack(sums), combined(self.config.measured, found))
        bad = first_bad_micro_batch(table, names, self.micro_batch_size, first=0)
        if bad is not None:
            raise NonFiniteError(bad)
        self._after_backward(by_layer := measurements(self.config.measured, measured))
        return step_result(self.terms, table.sum(0), counts, rows.documents.attended_pairs, by_layer, digest)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        # In fp64: over a million elements the fp32 sum of a CPU is off in the fifth digit.
        norms = torch._foreach_norm(grads, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
        value = float(torch.stack(norms).norm())
        if not math.isfinite(value):
            bad = [name for name, m in self.masters.items() if m.grad is not None and not m.grad.isfinite().all()]
            raise NonFiniteError(f"gradient norm is {value}; first non-finite gradient: {bad[0] if bad else 'none'}")
        # With DeepSpeed's epsilon, which tells only where the norm itself is tiny.
        scale = self.optimizer_config.clip_grad / (value + 1e-6)
        if 0 < scale < 1:
            torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.dtype == torch.float32)
        self._after_update()
        self.publish_masters()
        return value

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
        frozen = {n: t for n, t in self._views({}).items()}
        found = {f"frozen.{name}": tensor for name, tensor in frozen.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            moments = {name: self.optimizer.state[master][key] for name, master in self.masters.items()}
            found |= {f"{key}.{n}": t for n, t in self._views(moments).items() if n not in frozen}
        return {**found, **{f"master.{n}": t for n, t in self._views(self.masters).items() if n not in frozen}}

    def share(self) -> Mapping[str, Tensor]:
        return self.tensors()

    def fill(self, read: Read, kinds: Iterable[str] = STATE) -> None:
        chosen = tuple(f"{kind}." for kind in kinds)
        read({key: tensor for key, tensor in self.tensors().items() if key.startswith(chosen)})
        self.publish_masters()

    def counters(self) -> dict[str, Any]:
        # Parameters that had no gradient for a while, such as plastic ones in a phase without plasticity.
        steps = self._parameter_steps()
        latest = max(steps.values())
        late = {name: step for name, step in steps.items() if step != latest}
        return super().counters() | ({"late_parameters": late} if late else {})

    def load_counters(self, counters: dict[str, Any]) -> None:
        super().load_counters(counters)
        for name, step in counters.get("late_parameters", {}).items():
            self.optimizer.state[self.masters[name]]["step"].fill_(step)

    def _parameter_steps(self) -> dict[str, int]:
        return {name: int(self.optimizer.state[master]["step"]) for name, master in self.masters.items()}

    @property
    def optimizer_step(self) -> int:
        return max(self._parameter_steps().values())

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(value)


def read_back(
    sums: Tensor, measured: Mapping[str, tuple[list[int], Tensor]]
) -> tuple[Tensor, dict[str, tuple[list[int], Tensor]]]:
    """A table of sums, and what `combined` gives, as fp64 on the host, in one message."""
    host = on_host(sums=sums, **{name: values for name, (_, values) in measured.items()})
    return host["sums"], {name: (layers, host[name]) for name, (layers, _) in measured.items()}


def first_bad_micro_batch(table: Tensor, names: Sequence[str], size: int, *, first: int) -> str | None:
    """A sentence about the first row of `[micro-batches, terms]` that is not finite; `first`: of its rows."""
    for index, row in enumerate(table.isfinite().all(1).tolist()):
        if not row:
            rows = first + index * size
            terms = dict(zip(names, table[index].tolist(), strict=True))
            return f"loss is not finite in rows {rows} to {rows + size - 1} of the batch ({terms})"
    return None


def measurements(
    measured: Sequence[Measured], table: Mapping[str, tuple[list[int], Tensor]]
) -> dict[str, dict[int, Any]]:
    """`StepResult.measured` of a table on the host; sums are whole numbers."""
    found: dict[str, dict[int, Any]] = {}
    for measure in measured:
        layers, values = table[measure.name]
        rows = (values.long() if measure.over == "sum" else values).tolist()
        found[measure.name] = {i: row if measure.width > 1 else row[0] for i, row in zip(layers, rows, strict=True)}
    return found


def step_result(
    terms: Sequence[Term],
    sums: Tensor,
    counts: Counts,
    attended_pairs: int,
    measured: dict[str, dict[int, Any]],
    digest: int,
) -> StepResult:
    """From the sums of a whole step, on the host."""
    by_name = dict(zip((term.name for term in terms), sums.tolist(), strict=True))
    return StepResult(
        loss=weighted(terms, by_name, counts),
        terms={term.name: by_name[term.name] / counts.of(term.per) for term in terms},
        counts=counts,
        attended_pairs=attended_pairs,
        measured=measured,
        digest=digest,
    )


def on_host(**named: Tensor) -> dict[str, Tensor]:
    """Small tensors as fp64 on the host, read from the device in one message."""
    device = next(iter(named.values())).device
    message = torch.cat([tensor.to(device, torch.float64).flatten() for tensor in named.values()]).cpu()
    pieces = message.split([tensor.numel() for tensor in named.values()])
    return {name: piece.view(tensor.shape) for (name, tensor), piece in zip(named.items(), pieces, strict=True)}


AnyModel = TypeVar("AnyModel", bound=LanguageModel)


def materialize(make: Callable[[], AnyModel], *, device: torch.device, dtype: torch.dtype) -> AnyModel:
    """What `make` builds, with empty parameters in `dtype` on `device`.

    Parameters that a module lists in `wide_parameters` are in fp32 at least: they are their own masters then.  Frozen
    tensors keep their own dtype: they are few, and exact.  Raises UserError, before anything is allocated, for a model
    whose tensors alone are more than all of the device's memory.
    """
    with torch.device("meta"):
        model = make()
    for module in model.modules():
        wide = getattr(module, "wide_parameters", ())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the weights of model.kind={model.config.kind} take {needed / 2**30:,.1f} GiB and this {device.type} has "
            f"{there / 2**30:,.1f}; make model.num_layers, its widths or model.vocab_size smaller"
        )
    return model.to_empty(device=device)
