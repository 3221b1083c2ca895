"""What an engine is: it turns rows into updates, and gives and takes the state of a checkpoint."""

import abc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm.data.batch import Batch
from lfm.kernels.backend import widest
from lfm.layers.documents import Counts
from lfm.layers.liquid import Liquid
from lfm.layers.router import Balance
from lfm.models.losses import Measured, Objective, Term, weighted
from lfm.training.draws import seed_draws, seed_of_draws
from lfm.training.guards import Guard
from lfm.training.optimizer.kind import OptimizerKind


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


class Engine(abc.ABC):
    """What the training loop drives.  Every method is called on every process of the run, in the same order."""

    config: Any
    """Of the model's family."""
    optimizer_config: OptimizerKind
    objective: Objective
    device: torch.device
    seed: int
    guards: Sequence[Guard]
    """In the order in which they act."""
    state_tensors_are_fresh = False
    """Whether `state_tensors` returns copies, which later steps leave alone and its next call writes over."""

    rows_a_round: int
    """Rows that one round of `evaluate` takes without filling up."""
    _step = 0
    """The optimizer step, 0-based, that `start_step` named last."""

    @abc.abstractmethod
    def rows_of_step(self, global_batch_size: int) -> slice:
        """Which rows of each optimizer step this process wants."""

    @abc.abstractmethod
    def forward_backward(self, batch: Batch) -> StepResult:
        """Gradients of one optimizer step, from this process's rows of it; `step` then makes the update.

        Each term is summed and divided by the labels, rows or documents of the whole step: neither micro-batches nor
        processes matter.  Raises NonFiniteError naming the rows of the first bad micro-batch.
        """

    @abc.abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update, publish; returns the norm of the whole gradient before clipping.

        inf: gradients of float16 overflowed, and the update was skipped.  Raises NonFiniteError, without an update,
        when the norm is not finite for another reason.
        """

    def update(self, batch: Batch, lr: float) -> tuple[StepResult, float]:
        """One optimizer step: what `forward_backward` and `step` give, one after the other."""
        result = self.forward_backward(batch)
        return result, self.step(lr)

    @abc.abstractmethod
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(sum of cross entropy in nats, number of labels) of rows, dropless; all give all rows."""

    @abc.abstractmethod
    def state_tensors(self) -> Mapping[str, Tensor]:
        """This process's part of a checkpoint, by key; a DTensor where it has a slice of the whole."""

    @abc.abstractmethod
    def load_state_tensors(self, read: Read, kinds: Iterable[str] | None = None) -> None:
        """Take the named kinds of state, or all, from a checkpoint of any engine and layout.

        Moving tensors that `read` leaves alone are then as before the first step.
        """

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What a checkpoint holds of an engine: keys are these, a dot, and a global name."""
        return ("master", *self.optimizer_config.state_keys, "moving", "frozen")

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
    @abc.abstractmethod
    def balances(self) -> Mapping[int, Balance]:
        """What the routers of this process are balanced by, by layer number."""

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
        """Called before optimizer step `step` (0-based) of a run of `total_steps`: phases of training switch here, and
        random draws are of this step."""
        assert 0 <= step < total_steps
        self._step = step

    def _start_micro_batch(self, first_row: int) -> None:
        """Called before the forward pass of the micro-batch that begins with this row of the whole step."""
        seed_draws(seed_of_draws(self.seed, self._step, first_row), self.device)

    def record(self) -> dict[str, Any]:
        """What records hold of the guards, after an update."""
        found: dict[str, Any] = {}
        for guard in self.guards:
            found |= guard.record()
        return found

    def state_values(self) -> dict[str, Any]:
        """Everything else of the engine's state, as JSON values."""
        found: dict[str, Any] = {"optimizer_step": self.optimizer_step}
        for guard in self.guards:
            found |= guard.state()
        return found

    def load_state_values(self, counters: dict[str, Any]) -> None:
        """Restore `state_values()`."""
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

    def _after_backward(self, measured: Mapping[str, dict[int, Any]]) -> dict[str, dict[int, Any]]:
        """Hand what a step measured to the guards; what records show of it."""
        for guard in self.guards:
            guard.after_backward(measured)
        return {measure.name: measured[measure.name] for measure in self.config.measured if measure.is_shown}

    def _after_update(self) -> bool:
        """Whether a guard changed a master."""
        return any([guard.after_update(self.optimizer_step, self) for guard in self.guards])

    def memory_bytes(self) -> int:
        """Peak memory: the device's allocator on a GPU, the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def synchronize(self) -> float:
        """Wait for the device; the time, in seconds, of a monotonic clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


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
        found[measure.name] = {i: row if measure.is_list else row[0] for i, row in zip(layers, rows, strict=True)}
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
    message = torch.cat([tensor.to(device, widest(device)).flatten() for tensor in named.values()]).cpu().double()
    pieces = message.split([tensor.numel() for tensor in named.values()])
    return {name: piece.view(tensor.shape) for (name, tensor), piece in zip(named.items(), pieces, strict=True)}
