"""`liquid_cell`: checks, the choice of path, and the closed-form gradient."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.liquid_cell.limits import EVALUATIONS, TOKENS, WIDTHS
from lfm.kernels.liquid_cell.reference import (
    CellWeights,
    Integration,
    Norm,
    Synapses,
    Traces,
    drive,
    liquid_cell_reference,
)
from lfm.kernels.liquid_cell.running_trace import TraceRule, grown_by_mean


def liquid_cell(
    x: Float[Tensor, "B T D"],
    state: Float[Tensor, "B D"],
    weights: CellWeights,
    norm: Norm,
    integration: Integration,
    *,
    keep: Float[Tensor, "B T D"] | None = None,
    fresh: Bool[Tensor, "B T"] | None = None,
    synapses: Synapses | None = None,
    traces: Traces | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T D"], Traces | None]:
    """The states `keep * norm(end point + x)` of T tokens, each the start of the next; the equations are in the README.

    x, state: in at least fp32, in which everything is computed; state `[B, D]` is the first token's start.
    keep: what each state is multiplied by (dropout), without a gradient; None is 1.
    fresh: True where a sequence forgets its state and traces before a token.
    synapses, traces: of a plastic cell, both or neither.  Tokens are read with the traces of those before them.

    Returns the states and the traces behind the last token.  All but keep and fresh have gradients.

    "triton" keeps a window of tokens on the device, one program a sequence: up to fp32, D of 16 to 512 that is a power
    of two, fixed steps of at most 16 evaluations a token.  With traces that grow by means over the batch it keeps a
    token there, and only where all sequences show one trace, of stride 0.  "reference" is plain PyTorch.
    """
    if (synapses is None) != (traces is None):
        raise ValueError("synapses and traces go together; one of them is None")
    # What the kernels are compared for is a dtype of matrices.
    plastic = synapses is not None and synapses.ih.mode == "per_sequence"
    about = (weights.hidden, backend, _comparison, x.shape[-1], int(plastic))
    if not (_held(x, state, integration, fresh, synapses, traces) and runs_triton(*about)):
        return liquid_cell_reference(x, state, weights, norm, integration, keep, fresh, synapses, traces)
    driven = drive(x, weights)
    if synapses is not None and traces is not None and synapses.ih.mode == "batch_mean":
        return _shared(x, driven, state, weights, norm, integration, keep, synapses, traces)
    with_grad = torch.is_grad_enabled()
    longest = TOKENS if traces is not None or not with_grad else x.shape[1]
    parts = []
    for first in range(0, x.shape[1], longest):
        part = slice(first, first + longest)
        kept, begun = (None if given is None else given[:, part] for given in (keep, fresh))
        states, traces = _window(
            x[:, part], driven[:, part], state, weights, norm, integration, kept, begun, synapses, traces
        )
        state = states[:, -1]
        parts.append(states)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), traces


def _held(
    x: Tensor,
    state: Tensor,
    integration: Integration,
    fresh: Tensor | None,
    synapses: Synapses | None,
    traces: Traces | None,
) -> bool:
    """Whether the kernels take such a call."""
    fixed = not integration.adaptive and integration.evaluations <= EVALUATIONS
    held = fixed and x.shape[-1] in WIDTHS and x.numel() > 0
    if not held or x.dtype != torch.float32 or state.dtype != torch.float32:
        return False
    if synapses is None or traces is None:
        return True
    if synapses.ih.mode == "batch_mean":
        # One matrix that all sequences show.  None that begins anew leaves the traces of the others.
        return fresh is None and all(trace.stride(0) == 0 or len(trace) == 1 for trace in traces)
    # Through constant changes the kernels give no gradient to the traces before the window.
    return synapses.ih.differentiable or not any(trace.requires_grad for trace in traces)


def _window(
    x: Tensor,
    driven: Tensor,
    state: Tensor,
    weights: CellWeights,
    norm: Norm,
    integration: Integration,
    keep: Tensor | None,
    fresh: Tensor | None,
    synapses: Synapses | None,
    traces: Traces | None,
) -> tuple[Tensor, Traces | None]:
    plastic: tuple[Tensor | None, ...] = (None,) * 5
    if synapses is not None and traces is not None:
        rules = torch.cat([part.reshape(1) for rule in synapses for part in (rule.eta, rule.decay, rule.largest)])
        plastic = (*traces, *(rule.alpha for rule in synapses), rules)
    through = synapses is not None and synapses.ih.differentiable
    found = _LiquidCell.apply(
        x, driven, state, weights.hidden, weights.tau, weights.tau_bias, norm.weight, norm.bias, *plastic,
        keep, fresh, norm.epsilon, integration, through,
    )  # fmt: skip
    states, _, ih, hh = cast(tuple[Tensor, Tensor, Tensor, Tensor], found)
    return states, None if traces is None else Traces(ih, hh)


def _shared(
    x: Tensor,
    driven: Tensor,
    state: Tensor,
    weights: CellWeights,
    norm: Norm,
    integration: Integration,
    keep: Tensor | None,
    synapses: Synapses,
    traces: Traces,
) -> tuple[Tensor, Traces]:
    """With traces that all sequences share: at each token the cell is one without traces, of other matrices."""
    (B, T, D), states = x.shape, []
    of_hh, of_tau = weights.hidden.to(x.dtype).chunk(2)
    alphas = [rule.alpha.to(x.dtype) for rule in synapses]
    shared = [trace[0] for trace in traces]
    for t in range(T):
        hidden = torch.cat((torch.addcmul(of_hh, alphas[1], shared[1]), of_tau))
        x_t, driven_t = x[:, t], driven[:, t]
        drive_z = torch.addmm(driven_t[:, :D], x_t, (alphas[0] * shared[0]).T)
        driven_t = torch.cat((drive_z, driven_t[:, D:]), 1)
        found = _LiquidCell.apply(
            x_t[:, None], driven_t[:, None], state, hidden, weights.tau, weights.tau_bias, norm.weight, norm.bias,
            *(None,) * 5, None if keep is None else keep[:, t, None], None, norm.epsilon, integration, False,
        )  # fmt: skip
        after, end, _, _ = cast(tuple[Tensor, Tensor, None, None], found)
        state, end = after[:, 0], end[:, 0]
        states.append(after)
        with torch.set_grad_enabled(synapses.ih.differentiable and torch.is_grad_enabled()):
            shared = [
                grown_by_mean(rule, trace, end, pre)
                for rule, trace, pre in zip(synapses, shared, (x_t, end), strict=True)
            ]
    return torch.cat(states, 1), Traces(*(trace.expand(B, D, D) for trace in shared))


class _LiquidCell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        driven: Tensor,
        state: Tensor,
        hidden: Tensor,
        tau: Tensor,
        tau_bias: Tensor,
        gain: Tensor,
        bias: Tensor,
        ih: Tensor | None,
        hh: Tensor | None,
        alpha_ih: Tensor | None,
        alpha_hh: Tensor | None,
        rules: Tensor | None,
        keep: Tensor | None,
        fresh: Tensor | None,
        epsilon: float,
        integration: Integration,
        through: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        from lfm.kernels.liquid_cell import kernel

        ctx.set_materialize_grads(False)
        x, driven, state = x.contiguous(), driven.contiguous(), state.contiguous()
        keep, fresh, alpha_ih, alpha_hh = (
            None if given is None else given.contiguous() for given in (keep, fresh, alpha_ih, alpha_hh)
        )
        matrices = kernel.Matrices(hidden.contiguous(), tau.contiguous(), alpha_ih, alpha_hh)
        traces = None if ih is None or hh is None else (ih.contiguous(), hh.contiguous())
        states, window = kernel.forward(
            x, driven, state, matrices, tau_bias, gain, bias, epsilon, integration, keep, fresh, traces, rules
        )
        ctx.about = epsilon, integration, through
        ctx.save_for_backward(x, *matrices, gain, keep, fresh, *(traces or (None, None)), rules, *window)
        ih, hh = (None, None) if traces is None else kernel.traces_after(window, x, traces)
        return states, window.end, ih, hh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.liquid_cell import kernel

        grad_states, grad_end, grad_ih, grad_hh = grad_outputs
        x, hidden, tau, alpha_ih, alpha_hh, gain, keep, fresh, ih, hh, rules, *saved = ctx.saved_tensors
        matrices, window = kernel.Matrices(hidden, tau, alpha_ih, alpha_hh), kernel.Window(*saved)
        epsilon, integration, through = ctx.about
        traces = None if ih is None else (ih, hh)
        grad_states = torch.zeros_like(x) if grad_states is None else grad_states.contiguous()
        grad_end = None if grad_end is None else grad_end.contiguous()
        found = kernel.backward(
            grad_states, grad_end, (grad_ih, grad_hh), x, matrices, gain, epsilon, integration, keep, fresh, traces,
            rules, window, through=through,
        )  # fmt: skip
        D = x.shape[-1]
        fields, rates = found.fields.view(-1, 2 * D), found.rates.view(-1, D)
        needs_hidden, needs_tau = ctx.needs_input_grad[3:5]
        grad_hidden = (fields.T @ window.u.view(-1, D)).to(matrices.hidden.dtype) if needs_hidden else None
        grad_tau = (rates.T @ window.r.view(-1, D)).to(matrices.tau.dtype) if needs_tau else None
        grad_gain, grad_bias = found.norm.sum(0)
        of_traces, of_alpha, of_rules = (None, None), (None, None), None
        if traces is not None:
            of_alpha = kernel.alpha_gradients(x, fresh, traces, rules, window, found)
            of_alpha = [grad.to(matrices.hidden.dtype) for grad in of_alpha]
        if found.traces is not None and found.rules is not None:
            of_traces, of_rules = found.traces, found.rules.sum(0)
        return (
            found.x, found.drive, found.state, grad_hidden, grad_tau, rates.sum(0), grad_gain, grad_bias,
            *of_traces, *of_alpha, of_rules, None, None, None, None, None,
        )  # fmt: skip


def _comparison(device: torch.device, dtype: torch.dtype, D: int, plastic: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of matrices in `dtype`: two sequences of more tokens than a window of traces, one of which begins anew."""
    B, T = 2, TOKENS + 2 if plastic else 4

    def drawn(
        seed: int, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return (mean + scale * draw(seed, *shape, device=device, dtype=torch.float32)).to(dtype).requires_grad_()

    leaves = {"x": drawn(0, B, T, D), "the state": drawn(1, B, D)}
    for seed, (name, rows) in enumerate((("input", 2), ("hidden", 2), ("tau", 1)), 2):
        leaves[name] = drawn(seed, rows * D, D, scale=0.5 * D**-0.5, dtype=dtype)
    for seed, (name, length) in enumerate((("input bias", 2 * D), ("gain", D), ("bias", D)), 5):
        leaves[name] = drawn(seed, length)
    # Time constants and traces that let no rounding grow from token to token, at any width.
    leaves["tau bias"] = drawn(8, D, scale=0.5, mean=1.0)
    if plastic:
        for seed, name in enumerate(("ih", "hh"), 9):
            leaves[f"M_{name}"] = drawn(seed, B, D, D, scale=0.1)
            leaves[f"alpha_{name}"] = drawn(seed + 2, D, D, scale=0.3 * D**-0.5, dtype=dtype)
            # Half of the norm at first; where a sequence begins anew, it is out of reach.
            for part, value in (("eta", 1 / D), ("decay", 0.95), ("largest", 0.05 * D)):
                leaves[f"{part}_{name}"] = torch.full((1,), value, device=device, requires_grad=True)
    fresh = torch.arange(T, device=device)[None] == torch.tensor([[2], [T]], device=device)
    keep = draw(20, B, T, D, device=device, dtype=torch.float32).gt(-1).float()
    upstream = [
        draw(seed, *shape, device=device, dtype=torch.float32) for seed, shape in ((21, (B, T, D)), (22, (B, D, D)))
    ]

    def outputs_and_gradients(backend: Backend) -> list[Tensor]:
        weights = CellWeights(*(leaves[name] for name in ("input", "input bias", "hidden", "tau", "tau bias")))
        synapses, traces = None, None
        if plastic:
            ih, hh = (
                TraceRule(
                    leaves[f"alpha_{name}"], leaves[f"eta_{name}"], leaves[f"decay_{name}"], leaves[f"largest_{name}"],
                    mode="per_sequence", differentiable=True,
                )
                for name in ("ih", "hh")
            )  # fmt: skip
            synapses, traces = Synapses(ih, hh), Traces(leaves["M_ih"], leaves["M_hh"])
        states, after = liquid_cell(
            leaves["x"], leaves["the state"], weights, Norm(leaves["gain"], leaves["bias"], 1e-5),
            Integration("rk2", 2), keep=keep, fresh=fresh, synapses=synapses, traces=traces, backend=backend,
        )  # fmt: skip
        outputs = [states, *(after or ())]
        grads = [upstream[0], *(upstream[1] for _ in after or ())]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]

    names = [
        "the states",
        *(("M_ih behind", "M_hh behind") if plastic else ()),
        *(f"the gradient of {n}" for n in leaves),
    ]
    yield from zip(names, outputs_and_gradients("triton"), outputs_and_gradients("reference"), strict=True)
