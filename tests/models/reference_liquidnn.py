"""MiniLiquidGPT by its equations: one sequence, one token, whole traces; no shared code."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Memory = tuple[list[Tensor], dict[int, list[Tensor]]]
"""Hidden states by cell, and [M_ih, M_hh] by plastic cell."""


def empty_memory(c) -> Memory:
    D = c.hidden_size
    hidden = [torch.zeros(D, dtype=torch.float64) for _ in range(c.num_fast + c.num_deep)]
    deep = range(c.num_fast, c.num_fast + c.num_deep)
    return hidden, {i: [torch.zeros(D, D, dtype=torch.float64) for _ in range(2)] for i in deep}


def position_signal(c, position: int) -> Tensor:
    signal = torch.zeros(c.hidden_size, dtype=torch.float64)
    if c.positions == "until_max" and position >= c.max_positions:
        return signal
    for k in range(c.hidden_size // 2):
        angle = position * 10_000 ** (-2 * k / c.hidden_size)
        signal[2 * k], signal[2 * k + 1] = math.sin(angle), math.cos(angle)
    return signal


def normalised(w: dict[str, Tensor], name: str, c, x: Tensor) -> Tensor:
    variance = (x - x.mean()).square().mean()
    return (x - x.mean()) / (variance + c.layernorm_epsilon).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def cell(w: dict[str, Tensor], i: int, c, x: Tensor, h: Tensor, traces: list[Tensor] | None) -> Tensor:
    p = f"cells.{i}."
    A_ih, A_hh = w[p + "ih.weight"], w[p + "hh.weight"]
    if traces is not None:
        A_ih = A_ih + w[p + "ih.alpha"] * traces[0]
        A_hh = A_hh + w[p + "hh.alpha"] * traces[1]

    def z(h: Tensor) -> Tensor:
        return torch.tanh(A_ih @ x + w[p + "ih.bias"] + A_hh @ h + w[p + "hh.bias"])

    def tau(h: Tensor) -> Tensor:
        inner = F.silu(w[p + "tau_input.weight"] @ torch.cat((x, h)) + w[p + "tau_input.bias"])
        return F.softplus(w[p + "tau_output.weight"] @ inner + w[p + "tau_output.bias"]) + 0.2

    def f(h: Tensor) -> Tensor:
        return (z(h) - h) / tau(h)

    n = c.fast_steps if i < c.num_fast else c.deep_steps
    if c.adaptive_steps:
        n = max(n, math.ceil(1 / float(tau(h).detach().min())))
    for _ in range(n):
        if c.integrator == "exponential":
            h = h + (1 - torch.exp(-1 / (n * tau(h)))) * (z(h) - h)
        elif c.integrator == "euler" or n == 1:
            h = h + f(h) / n
        else:
            h = h + f(h + f(h) / (2 * n)) / n
    return h


def updated(w: dict[str, Tensor], name: str, trace: Tensor, outer: Tensor) -> Tensor:
    eta, decay = 0.03 * F.softplus(w[name + ".log_eta"]), torch.sigmoid(w[name + ".logit_decay"])
    trace = decay * trace + eta * outer
    largest = 0.3 * w[name + ".weight"].square().sum().sqrt()
    norm = trace.square().sum().sqrt()
    return trace * largest / (norm + 1e-8) if norm > largest else trace


def batch_forward(
    w: dict[str, Tensor], c, rows: list[list[int]], *, plastic: bool, memories: list[Memory] | None = None, first=0
) -> tuple[Tensor, list[Memory]]:
    """Logits `[B, T, V]` of equally long rows whose first token is at position `first`, and what is remembered."""
    memories = memories or [empty_memory(c) for _ in rows]
    hiddens, traces = [list(m[0]) for m in memories], [dict(m[1]) for m in memories]
    logits = []
    for t in range(len(rows[0])):
        ends: list[dict[int, tuple[Tensor, Tensor]]] = []
        for row, hidden, trace in zip(rows, hiddens, traces, strict=True):
            x, end = w["embedding.weight"][row[t]] + position_signal(c, first + t), {}
            for i in range(c.num_fast + c.num_deep):
                h = cell(w, i, c, x, hidden[i], trace.get(i) if plastic else None)
                end[i] = (h, x)
                x = hidden[i] = normalised(w, f"norms.{i}", c, h + x)
            ends.append(end)
            logits.append(w["embedding.weight"] @ normalised(w, "final_norm", c, x))
        if not plastic:
            continue
        for trace, end in zip(traces, ends, strict=True):
            for i in trace:
                pairs = [end[i]] if c.trace_mode == "per_sequence" else [other[i] for other in ends]
                outers = [
                    sum(torch.outer(h, x) for h, x in pairs) / len(pairs),
                    sum(torch.outer(h, h) for h, _ in pairs) / len(pairs),
                ]
                new = [updated(w, f"cells.{i}.{n}", trace[i][k], outers[k]) for k, n in enumerate(("ih", "hh"))]
                trace[i] = [m if c.trace_grad else m.detach() for m in new]
    stacked = torch.stack(logits).unflatten(0, (len(rows[0]), len(rows))).transpose(0, 1)
    return stacked, list(zip(hiddens, traces, strict=True))


def sequence_loss(w: dict[str, Tensor], c, ids: list[int], *, plastic: bool) -> Tensor:
    """Sum of cross entropy of one document, its memory detached every `bptt_window` tokens."""
    loss, memories = torch.zeros((), dtype=torch.float64), [empty_memory(c)]
    for start in range(0, len(ids) - 1, c.bptt_window):
        part = ids[start : start + c.bptt_window]
        logits, found = batch_forward(w, c, [part], plastic=plastic, memories=memories, first=start)
        for t, row in enumerate(logits[0]):
            if start + t + 1 < len(ids):
                loss = loss - row.log_softmax(0)[ids[start + t + 1]]
        hidden, traces = found[0]
        memories = [([h.detach() for h in hidden], {i: [m.detach() for m in ms] for i, ms in traces.items()})]
    return loss
