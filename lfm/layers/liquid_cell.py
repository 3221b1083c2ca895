"""The liquid cell: neurons with time constants of their own, on synapses that change while they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Integrator = Literal["euler", "rk2", "exponential"]
TraceMode = Literal["per_sequence", "batch_mean"]

SMALLEST_TAU = 0.2
"""In units of a token: the least time constant, and so the reason why adaptive steps end at 1 / 0.2 = 5."""
LARGEST_TRACE = 0.3
"""Norm of a trace over that of its weight."""


@dataclass
class Traces:
    """What the two synapses of a cell remember of each sequence."""

    ih: Float[Tensor, "B D D"]
    hh: Float[Tensor, "B D D"]


@dataclass(frozen=True)
class TraceRule:
    """How a trace acts and changes, in at least fp32."""

    alpha: Float[Tensor, "D D"]
    eta: Float[Tensor, " 1"]
    decay: Float[Tensor, " 1"]
    largest: Float[Tensor, ""]
    """Frobenius norm at which a trace is held."""


@dataclass(frozen=True)
class CellWeights:
    """A cell's weights in at least fp32, those that multiply the same vector joined: made once for many tokens."""

    input: Float[Tensor, "2D D"]
    input_bias: Float[Tensor, " 2D"]
    hidden: Float[Tensor, "2D D"]
    tau: Float[Tensor, "D D"]
    tau_bias: Float[Tensor, " D"]
    ih: TraceRule | None
    hh: TraceRule | None


class PlasticSynapse(nn.Module):
    """`(W + alpha * M) x + b`, M the trace of what fired together in this sequence.

    Miconi et al. 2018, Differentiable plasticity (arXiv 1804.02464).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.alpha = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.log_eta = nn.Parameter(torch.empty(1))
        self.logit_decay = nn.Parameter(torch.empty(1))

    def rule(self) -> TraceRule:
        return TraceRule(
            alpha=_wide(self.alpha),
            eta=0.03 * F.softplus(_wide(self.log_eta)),
            decay=_wide(self.logit_decay).sigmoid(),
            largest=LARGEST_TRACE * torch.linalg.vector_norm(_wide(self.weight)),
        )


class LiquidCell(nn.Module):
    """One token of `dh/dt = (z(h) - h) / tau(h)`, and of the traces of the synapses that make z.

        z(h)   = tanh((W_ih + alpha_ih * M_ih) x + b_ih + (W_hh + alpha_hh * M_hh) h + b_hh)
        tau(h) = softplus(T2 silu(T1 [x; h] + t1) + t2) + 0.2
        M_ih  <- decay M_ih + eta h x^T     M_hh <- decay M_hh + eta h h^T     (h: after integration)
        then M is scaled down to the norm 0.3 |W| where it is longer

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
        self.trace_mode, self.trace_grad = trace_mode, trace_grad
        self.ih = PlasticSynapse(hidden_size)
        self.hh = PlasticSynapse(hidden_size)
        self.tau_input = nn.Linear(2 * hidden_size, hidden_size)
        self.tau_output = nn.Linear(hidden_size, hidden_size)

    def weights(self, *, plastic: bool) -> CellWeights:
        """For `step`; `plastic` with the rules of the traces."""
        tau_x, tau_h = _wide(self.tau_input.weight).chunk(2, dim=1)
        return CellWeights(
            input=torch.cat((_wide(self.ih.weight), tau_x)),
            input_bias=torch.cat((_wide(self.ih.bias) + _wide(self.hh.bias), _wide(self.tau_input.bias))),
            hidden=torch.cat((_wide(self.hh.weight), tau_h)),
            tau=_wide(self.tau_output.weight),
            tau_bias=_wide(self.tau_output.bias),
            ih=self.ih.rule() if plastic else None,
            hh=self.hh.rule() if plastic else None,
        )

    @staticmethod
    def drive(weights: CellWeights, x: Float[Tensor, "... D"]) -> Float[Tensor, "... 2D"]:
        """What z and tau take from x, without the traces."""
        return F.linear(x, weights.input, weights.input_bias)

    def step(
        self,
        weights: CellWeights,
        x: Float[Tensor, "B D"],
        drive: Float[Tensor, "B 2D"],
        h: Float[Tensor, "B D"],
        traces: Traces | None,
    ) -> tuple[Float[Tensor, "B D"], Traces | None]:
        """The ODE's end point for one token, `drive` being that of `x`, and the traces after it.

        The token is read with the `traces` of the tokens before it; without them the synapses are W alone.
        """
        w, plastic_hh = weights, None
        if traces is not None:
            assert w.ih is not None and w.hh is not None
            drive_z, drive_tau = drive.chunk(2, -1)
            drive = torch.cat((drive_z + _times(w.ih.alpha * traces.ih, x), drive_tau), -1)
            plastic_hh = w.hh.alpha * traces.hh

        def field(h: Tensor) -> tuple[Tensor, Tensor]:
            z, tau = torch.addmm(drive, h, w.hidden.T).chunk(2, -1)
            if plastic_hh is not None:
                z = z + _times(plastic_hh, h)
            return z.tanh(), F.softplus(torch.addmm(w.tau_bias, F.silu(tau), w.tau.T)) + SMALLEST_TAU

        h = self._integrate(h, field)
        if traces is not None:
            assert w.ih is not None and w.hh is not None
            with torch.set_grad_enabled(self.trace_grad and torch.is_grad_enabled()):
                traces = Traces(self._updated(w.ih, traces.ih, h, x), self._updated(w.hh, traces.hh, h, h))
        return h, traces

    def _integrate(self, h: Tensor, field: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """From time 0 to 1, the length of a token."""
        z, tau = field(h)
        if not self.adaptive_steps:
            for k in range(self.steps):
                h = self._stepped(h, *(field(h) if k else (z, tau)), field, 1 / self.steps, self.steps > 1)
            return h
        # Each sequence has its own number of steps, so that its batch and the split into calls do not matter.
        steps = self.chosen_steps(tau.detach())
        dt, midpoint = 1 / steps.to(h.dtype), steps > 1
        for k in range(int(steps.max())):
            stepped = self._stepped(h, *(field(h) if k else (z, tau)), field, dt, midpoint)
            h = torch.where(k < steps, stepped, h)
        return h

    def chosen_steps(self, tau: Float[Tensor, "B D"]) -> Tensor:
        """`[B, 1]`: the fewest steps, but at least `steps`, that are no longer than the least time constant at the
        token's start; at most max(steps, 5).
        """
        # Through integers first: a NaN becomes the least number of steps, and shows in the loss.
        needed = (1 / tau.amin(-1, keepdim=True)).ceil().long()
        return needed.clamp(self.steps, max(self.steps, round(1 / SMALLEST_TAU)))

    def _stepped(
        self,
        h: Tensor,
        z: Tensor,
        tau: Tensor,
        field: Callable[[Tensor], tuple[Tensor, Tensor]],
        dt: float | Tensor,
        midpoint: bool | Tensor,
    ) -> Tensor:
        """One step of `dt` from h, where the field is (z, tau); `midpoint`: the sequences that rk2 is for."""
        if self.integrator == "exponential":
            return h + -torch.expm1(-dt / tau) * (z - h)
        if self.integrator == "rk2" and midpoint is not False:
            middle = h + dt / 2 * midpoint * (z - h) / tau
            z, tau = field(middle)
            return h + dt * (z - middle) / tau
        return h + dt * (z - h) / tau

    def _updated(self, rule: TraceRule, trace: Tensor, post: Tensor, pre: Tensor) -> Tensor:
        if self.trace_mode == "batch_mean":
            outer = rule.eta / len(post) * (post.T @ pre)
        else:
            outer = (rule.eta * post)[:, :, None] * pre[:, None, :]
        trace = rule.decay * trace + outer
        norm = torch.linalg.vector_norm(trace, dim=(-2, -1), keepdim=True)
        return trace * torch.where(norm > rule.largest, rule.largest / (norm + 1e-8), 1.0)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`[B, D, D]` by `[B, D]`."""
    return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
