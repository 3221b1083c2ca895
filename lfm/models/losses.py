"""The loss as values: its terms, what is measured beside it, and what a run trains for.

A term is static: a pipeline stage needs its weight before a forward pass, and has a column for it where it lacks the
layers.  A forward pass gives sums over its rows, so that adding those of micro-batches and processes and dividing once,
by the counts of the whole optimizer step, is exact.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lfm.kernels.backend import widest
from lfm.kernels.reservoir import RecurrenceStats
from lfm.layers.documents import Rows, Unit
from lfm.layers.head import Head, Hidden
from lfm.layers.moe import MoEConfig
from lfm.layers.router import BiasBalance, Routing, fixed_point, observe


@dataclass(frozen=True)
class Term:
    """A summand of the loss: `weight` times the mean over all labels, rows or documents of a step."""

    name: str
    """In metrics, messages and the certificate."""
    per: Unit
    weight: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Something that layers are measured by while they train; it takes no part in the loss."""

    name: str
    over: Literal["sum", "mean", "max"]
    """How the numbers of micro-batches, and of processes, become one."""
    layers: tuple[int, ...]
    width: int = 1
    """Numbers of one layer."""
    is_list: bool = False
    """Whether a layer has a list of them, be it of one."""
    is_shown: bool = True
    """Whether records hold it; else it is for guards alone."""


Measurements = dict[str, dict[int, Tensor]]
"""Name -> layer -> `[width]`, or a scalar where that is 1; names that no `Measured` has are not read."""


@dataclass
class Losses:
    """What one forward pass adds to the loss."""

    sums: dict[str, Float[Tensor, ""]]
    """By name, of the terms that are here."""
    measure: Callable[[], Measurements] = dict
    """Called after the backward pass, which is measured too."""


@runtime_checkable
class Objective(Protocol):
    """What a run trains for, from a model's final hidden states; in `lfm/objectives/KIND.py`."""

    @property
    def terms(self) -> tuple[Term, ...]: ...

    @property
    def by_position(self) -> bool:
        """Whether sums are over positions, so that windows of a row can be differentiated one after the other."""
        ...

    def sums(self, hidden: Hidden, head: Head, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """By name of the terms, of all positions of `hidden`; `rows` may reach one id further."""
        ...


Number = TypeVar("Number", float, Tensor)


@runtime_checkable
class Denominators(Protocol):
    """`Counts`, or the same on a device."""

    def of(self, unit: Unit) -> Any: ...


def weighted(terms: Iterable[Term], sums: Mapping[str, Number], counts: Denominators) -> Any:
    """The loss: over labels, rows and documents in the order of the terms, the weighted sums divided by the count."""
    total: dict[Unit, Any] = {}
    for term in terms:
        if term.name in sums:
            total[term.per] = total.get(term.per, 0) + term.weight * sums[term.name]
    return sum(value / counts.of(unit) for unit, value in total.items())


Table = dict[str, tuple[list[int], Tensor]]
"""Name -> the layers that are here, in order, and numbers of each."""


def stacked(measured: Sequence[Measured], found: Sequence[Measurements]) -> Table:
    """Of several forward passes: `[layers, passes, width]`."""
    table: Table = {}
    for measure in measured:
        layers = sorted({layer for each in found for layer in each[measure.name]})
        if not layers:
            continue
        of_layers = [each[measure.name][i] for i in layers for each in found if i in each[measure.name]]
        table[measure.name] = layers, torch.stack(of_layers).view(len(layers), -1, measure.width)
    return table


def combined(measured: Sequence[Measured], tables: Sequence[Table]) -> Table:
    """Of what `stacked` gives of all passes of a step, which have the same layers: fp64 `[layers, width]`."""
    table: Table = {}
    for measure in measured:
        if not any(measure.name in each for each in tables):
            continue
        layers = tables[0][measure.name][0]
        values = torch.cat([each[measure.name][1] for each in tables], 1)
        over = {"sum": values.sum, "mean": values.mean, "max": values.amax}[measure.over]
        table[measure.name] = layers, over(1).to(widest(values.device))
    return table


def router_measured(layers: tuple[int, ...], moe: MoEConfig) -> tuple[Measured, ...]:
    """What routers are watched by: how many tokens chose each expert, before any is dropped; entropy of a token's
    probabilities, in nats; mean cosine between a row's inputs (of tensor-parallel processes, the first's part of it);
    sums of logits in fixed point, where the balance follows them."""
    found = (
        Measured("expert_load", "sum", layers, width=moe.num_moe_experts, is_list=True),
        Measured("router_entropy", "mean", layers),
        Measured("router_input_cosine", "mean", layers),
    )
    if isinstance(moe.balance, BiasBalance) and moe.balance.mean_decay is not None:
        found += (Measured("router_logits", "sum", layers, width=moe.num_moe_experts, is_list=True, is_shown=False),)
    return found


def router_measurements(routing: Mapping[int, Routing]) -> Measurements:
    """Of one forward pass that a backward pass may follow, by layer; made of all layers at once."""
    layers = [*routing.values()]
    observed, num_tokens = observe(layers), len(layers[0].experts) // len(layers[0].counts)
    found = {
        "expert_load": torch.stack([each.counts for each in layers]).sum(1),
        "router_entropy": observed.entropy,
        "router_input_cosine": observed.input_cosine,
        "router_logits": fixed_point(observed.mean_logit, num_tokens),
    }
    return {name: dict(zip(routing, values.unbind(), strict=True)) for name, values in found.items()}


def reservoir_measured(layers: tuple[int, ...]) -> tuple[Measured, ...]:
    """What chunked reservoirs are watched by: largest residual of a chunk boundary, forward and backward; share of
    activations with |tanh| > 0.95; mean slope of the tanh; passes that repaired a boundary; sequential fallbacks."""
    how: dict[str, Literal["sum", "mean", "max"]] = {
        "reservoir_residual": "max",
        "reservoir_saturation": "mean",
        "reservoir_gain": "mean",
        "reservoir_repair_passes": "sum",
        "reservoir_fallbacks": "sum",
    }
    return tuple(Measured(name, over, layers) for name, over in how.items()) if layers else ()


def reservoir_measurements(stats: Mapping[int, RecurrenceStats]) -> Measurements:
    """Of one forward pass and its backward, by layer."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.cat([x.reshape(-1) for x in (a, b) if x is not None])

    return {
        "reservoir_residual": {i: both(s.forward_residual, s.backward_residual).max() for i, s in stats.items()},
        "reservoir_saturation": {i: s.saturation for i, s in stats.items()},
        "reservoir_gain": {i: s.mean_gain for i, s in stats.items()},
        "reservoir_repair_passes": {i: both(s.repair_passes, s.backward_repair_passes).sum() for i, s in stats.items()},
        "reservoir_fallbacks": {i: both(s.fell_back, s.backward_fell_back).sum() for i, s in stats.items()},
    }
