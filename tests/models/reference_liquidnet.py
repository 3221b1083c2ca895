"""LiquidNet by its equations: one document, one token and one layer at a time; no shared code."""

import torch
from torch import Tensor


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def document_forward(w: dict[str, Tensor], config, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits `[T, V]` of one document and the state `[D]` of each layer after it."""
    L, eps, scale = config.num_layers, config.layernorm_epsilon, 1 / (2 * config.num_layers) ** 0.5
    E = w["embedding.weight"]
    h = [torch.zeros(config.hidden_size, dtype=E.dtype) for _ in range(L)]
    rows = []
    for token in ids:
        x = E[token]
        for i in range(L):
            p = f"layers.{i}.liquid."
            z = rms(x, w[f"layers.{i}.liquid_norm.weight"], eps)
            v = torch.tanh(w[p + "value.weight"] @ z)
            rate = (w[p + "delta.weight"] @ z + w[p + "delta.bias"]).exp().log1p() + config.delta_min
            open_gate = 1 / (1 + (-(w[p + "gate.weight"] @ z)).exp())
            h[i] = (-rate).exp() * h[i] + (1 - (-rate).exp()) * v
            x = x + scale * (w[p + "output.weight"] @ (open_gate * h[i]))
            p = f"layers.{i}.mlp."
            r = rms(x, w[f"layers.{i}.mlp_norm.weight"], eps)
            g = w[p + "gate.weight"] @ r
            x = x + scale * (w[p + "down.weight"] @ (g / (1 + (-g).exp()) * (w[p + "up.weight"] @ r)))
        rows.append(E[: config.vocab_size] @ rms(x, w["final_norm.weight"], eps))
    return torch.stack(rows), h


def batch_loss(w: dict[str, Tensor], config, rows: Tensor, lengths: list[list[int]]) -> Tensor:
    """Cross entropy summed over the labels of packed rows, in nats."""
    nats = torch.zeros((), dtype=torch.float64)
    for row, row_lengths in zip(rows, lengths, strict=True):
        for document in row.split(row_lengths):
            logits, _ = document_forward(w, config, document)
            for t in range(len(document) - 1):
                nats = nats + logits[t].exp().sum().log() - logits[t, document[t + 1]]
    return nats
