"""The liquid cell: neurons with time constants of their own, on synapses that change while they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.layers.plastic_synapse import PlasticSynapse, RunningTrace, TraceMode

Integrator = Literal["euler", "rk2", "exponential"]
Field = Callable[[Tensor], tuple[Tensor, Tensor]]
"""h -> (z, tau): where each neuron is drawn to, and how fast."""

SMALLEST_TAU = 0.2
"""In tokens.  Its inverse is the most steps that adaptive steps choose."""


@dataclass(frozen=True)
class CellWeights:
    """A cell's weights in at least fp32, those that multiply the same vector joined: made once for many tokens."""

    input: Float[Tensor, "two_D D"]
    input_bias: Float[Tensor, " two_D"]
    hidden: Float[Tensor, "two_D D"]
    tau: Float[Tensor, "D D"]
    tau_bias: Float[Tensor, " D"]


@dataclass
class Traces:
    """What the two synapses of a cell remember of each sequence."""

    ih: Float[Tensor, "B D D"]
    hh: Float[Tensor, "B D D"]


@dataclass(frozen=True)
class RunningTraces:
    """The same while tokens are read: updated in place."""

    ih: RunningTrace
    hh: RunningTrace

    def value(self) -> Traces:
        return Traces(self.ih.value(), self.hh.value())


class LiquidCell(nn.Module):
    """One token of `dh/dt = (z(h) - h) / tau(h)`, and of the traces of the synapses that make z.

        z(h)   = tanh((W_ih + alpha_ih * M_ih) x + b_ih + (W_hh + alpha_hh * M_hh) h + b_hh)
        tau(h) = softplus(T2 silu(T1 [x; h] + t1) + t2) + 0.2
        M_ih  <- decay M_ih + eta h x^T     M_hh <- decay M_hh + eta h h^T     (h: after integration)
        then M is scaled down to the norm 0.3 |W| if it is longer

    Hasani et al. 2021, Liquid time-constant networks (arXiv 2006.04439).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        steps: int,
        integrator: Integrator,
        adaptive_steps: bool,
        trace_mode: TraceMode,
        trace_grad: bool,
    ) -> None:
        super().__init__()
        self.steps, self.integrator, self.adaptive_steps = steps, integrator, adaptive_steps
        self.trace_mode: TraceMode = trace_mode
        self.trace_grad = trace_grad
        self.ih = PlasticSynapse(hidden_size)
        self.hh = PlasticSynapse(hidden_size)
        self.tau_input = nn.Linear(2 * hidden_size, hidden_size)
        self.tau_output = nn.Linear(hidden_size, hidden_size)

    def weights(self) -> CellWeights:
        tau_x, tau_h = _wide(self.tau_input.weight).chunk(2, dim=1)
        return CellWeights(
            input=torch.cat((_wide(self.ih.weight), tau_x)),
            input_bias=torch.cat((_wide(self.ih.bias) + _wide(self.hh.bias), _wide(self.tau_input.bias))),
            hidden=torch.cat((_wide(self.hh.weight), tau_h)),
            tau=_wide(self.tau_output.weight),
            tau_bias=_wide(self.tau_output.bias),
        )

    def running(self, traces: Traces) -> RunningTraces:
        ih, hh = (s.rule(mode=self.trace_mode, differentiable=self.trace_grad) for s in (self.ih, self.hh))
        return RunningTraces(RunningTrace(ih, traces.ih), RunningTrace(hh, traces.hh))

    @staticmethod
    def drive(weights: CellWeights, x: Float[Tensor, "... D"]) -> Float[Tensor, "... two_D"]:
        """What z and tau take from x, without the traces."""
        return F.linear(x, weights.input, weights.input_bias)

    def step(
        self,
        weights: CellWeights,
        x: Float[Tensor, "B D"],
        drive: Float[Tensor, "B two_D"],
        h: Float[Tensor, "B D"],
        traces: RunningTraces | None,
    ) -> Float[Tensor, "B D"]:
        """The ODE's end point for one token, `drive` being that of `x`.

        The token is read with the traces of the tokens before it, and then added to them; without `traces` the
        synapses are W alone.
        """
        if traces is not None:
            drive_z, drive_tau = drive.chunk(2, -1)
            drive = torch.cat((drive_z + traces.ih.times(x), drive_tau), -1)

        def field(h: Tensor) -> tuple[Tensor, Tensor]:
            z, tau = torch.addmm(drive, h, weights.hidden.T).chunk(2, -1)
            if traces is not None:
                z = z + traces.hh.times(h)
            tau = torch.addmm(weights.tau_bias, F.silu(tau), weights.tau.T)
            return z.tanh(), F.softplus(tau) + SMALLEST_TAU

        h = self._integrate(h, field)
        if traces is not None:
            traces.ih.update(h, x)
            traces.hh.update(h, h)
        return h

    def chosen_steps(self, tau: Float[Tensor, "B D"]) -> Int[Tensor, "B 1"]:
        """The fewest steps, but at least `steps`, that are no longer than the least time constant at the token's
        start; at most max(steps, 5).
        """
        # Through integers first: a NaN then becomes the least number of steps, and shows in the loss.
        needed = (1 / tau.amin(-1, keepdim=True)).ceil().long()
        return needed.clamp(self.steps, max(self.steps, round(1 / SMALLEST_TAU)))

    def _integrate(self, h: Tensor, field: Field) -> Tensor:
        """From time 0 to 1, the length of a token."""
        z, tau = field(h)
        if not self.adaptive_steps:
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
        if self.integrator == "rk2" and (self.steps > 1 or self.adaptive_steps):
            middle = h + dt * half * slope
            z, tau = field(middle)
            slope = (z - middle) / tau
        return h + dt * slope


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
