"""The definition of a liquid cell over the tokens of a window, and the path where the kernels do not run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lfm.kernels.liquid_cell.running_trace import RunningTrace, TraceRule

Integrator = Literal["euler", "rk2", "exponential"]
Field = Callable[[Tensor], tuple[Tensor, Tensor]]
"""h -> (z, tau): where each neuron is drawn to, and how fast."""

SMALLEST_TAU = 0.2
"""In tokens.  Its inverse is the most steps that adaptive steps choose."""


@dataclass(frozen=True)
class CellWeights:
    """A cell's matrices, those that multiply the same vector joined, in one dtype; biases in at least fp32."""

    input: Float[Tensor, "two_D D"]
    input_bias: Float[Tensor, " two_D"]
    hidden: Float[Tensor, "two_D D"]
    tau: Float[Tensor, "D D"]
    tau_bias: Float[Tensor, " D"]


@dataclass(frozen=True)
class Norm:
    """Layer norm behind a cell, in at least fp32."""

    weight: Float[Tensor, " D"]
    bias: Float[Tensor, " D"]
    epsilon: float


@dataclass(frozen=True)
class Integration:
    """How a token's differential equation is solved."""

    integrator: Integrator
    steps: int
    adaptive: bool = False
    """`steps` is the least number, and each sequence and token takes as many as its time constants need."""

    @property
    def has_midpoints(self) -> bool:
        return self.integrator == "rk2" and (self.steps > 1 or self.adaptive)

    @property
    def evaluations(self) -> int:
        """Of the field, a token, where steps are fixed."""
        return self.steps * (2 if self.has_midpoints else 1)

    def chosen_steps(self, tau: Float[Tensor, "B D"]) -> Int[Tensor, "B 1"]:
        """The fewest steps, but at least `steps`, that are no longer than the least time constant at the token's
        start; at most max(steps, 5).
        """
        # Through integers first: a NaN then becomes the least number of steps, and shows in the loss.
        needed = (1 / tau.amin(-1, keepdim=True)).ceil().long()
        return needed.clamp(self.steps, max(self.steps, round(1 / SMALLEST_TAU)))

    def solve(self, h: Float[Tensor, "B D"], field: Field) -> Float[Tensor, "B D"]:
        """From time 0 to 1, the length of a token."""
        z, tau = field(h)
        if not self.adaptive:
            for k in range(self.steps):
                if k:
                    z, tau = field(h)
                h = self._stepped(h, z, tau, field, 1 / self.steps, 0.5)
            return h
        # Each sequence has its own number of steps, so that its batch and the split into calls do not matter.
        steps = self.chosen_steps(tau.detach())
        dt, half = 1 / steps.to(h.dtype), 0.5 * (steps > 1)
        for k in range(int(steps.max())):
            if k:
                z, tau = field(h)
            h = torch.where(k < steps, self._stepped(h, z, tau, field, dt, half), h)
        return h

    def _stepped(
        self, h: Tensor, z: Tensor, tau: Tensor, field: Field, dt: float | Tensor, half: float | Tensor
    ) -> Tensor:
        """One step of `dt` from h, where the field is (z, tau); rk2 takes its slope after `half` of the step, which is
        none of it for a sequence of one step.
        """
        if self.integrator == "exponential":
            return h - torch.expm1(-dt / tau) * (z - h)
        slope = (z - h) / tau
        if self.has_midpoints:
            middle = h + dt * half * slope
            z, tau = field(middle)
            slope = (z - middle) / tau
        return h + dt * slope


@dataclass(frozen=True)
class Synapses:
    """The rules of a plastic cell's two synapses: ih for what comes in, hh for its own state."""

    ih: TraceRule
    hh: TraceRule

    def __iter__(self) -> Iterator[TraceRule]:
        return iter((self.ih, self.hh))


@dataclass
class Traces:
    """What the two synapses of a cell remember of each sequence."""

    ih: Float[Tensor, "B D D"]
    hh: Float[Tensor, "B D D"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.ih, self.hh))


def liquid_cell_reference(
    x: Float[Tensor, "B T D"],
    state: Float[Tensor, "B D"],
    weights: CellWeights,
    norm: Norm,
    integration: Integration,
    keep: Float[Tensor, "B T D"] | None,
    fresh: Bool[Tensor, "B T"] | None,
    synapses: Synapses | None,
    traces: Traces | None,
) -> tuple[Float[Tensor, "B T D"], Traces | None]:
    running = None
    if synapses is not None and traces is not None:
        running = RunningTrace(synapses.ih, traces.ih), RunningTrace(synapses.hh, traces.hh)
    hidden, tau, h, states = weights.hidden.to(x.dtype), weights.tau.to(x.dtype), state, []
    drives = drive(x, weights).unbind(1)
    for t, x_t in enumerate(x.unbind(1)):
        if fresh is not None:
            h = h.masked_fill(fresh[:, t, None], 0)
            for trace in running or ():
                trace.forget(fresh[:, t])
        end = end_point(x_t, drives[t], h, hidden, tau, weights.tau_bias, integration, running)
        h = F.layer_norm(end + x_t, norm.weight.shape, norm.weight, norm.bias, norm.epsilon)
        if keep is not None:
            h = h * keep[:, t]
        states.append(h)
    return torch.stack(states, 1), None if running is None else Traces(running[0].value(), running[1].value())


def drive(x: Float[Tensor, "... D"], weights: CellWeights) -> Float[Tensor, "... two_D"]:
    """What z and tau take from x, without the traces."""
    return F.linear(x, weights.input.to(x.dtype), weights.input_bias)


def end_point(
    x: Tensor,
    drive: Tensor,
    h: Tensor,
    hidden: Tensor,
    tau_weight: Tensor,
    tau_bias: Tensor,
    integration: Integration,
    running: tuple[RunningTrace, RunningTrace] | None,
) -> Tensor:
    """The end point of one token, read with the traces of the tokens before it, and then added to them."""
    if running is not None:
        drive_z, drive_tau = drive.chunk(2, -1)
        drive = torch.cat((drive_z + running[0].times(x), drive_tau), -1)

    def field(h: Tensor) -> tuple[Tensor, Tensor]:
        z, tau = torch.addmm(drive, h, hidden.T).chunk(2, -1)
        if running is not None:
            z = z + running[1].times(h)
        tau = torch.addmm(tau_bias, F.silu(tau), tau_weight.T)
        return z.tanh(), F.softplus(tau) + SMALLEST_TAU

    h = integration.solve(h, field)
    if running is not None:
        running[0].update(h, x)
        running[1].update(h, h)
    return h
