"""LAERC by its equations: one document, one token and one block at a time; float64; no shared code."""

import math

import torch
from torch import Tensor


def layer_norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + eps) * w[name + ".weight"] + w[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = gelu(w[name + ".up.weight"] @ x + w[name + ".up.bias"])
    return w[name + ".down.weight"] @ inner + w[name + ".down.bias"]


def block(w: dict[str, Tensor], p: str, c, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """One token `x [D]` through the block whose names begin with `p`; `r [R]` is what its reservoir held before."""
    rho = torch.zeros_like(x)
    if c.use_reservoir:
        h, f = layer_norm(w, p + "input_norm", x, c.layernorm_epsilon), p + "reservoir."
        z = w[f + "input_weight"] @ h + w[f + "input_bias"] + w[f + "recurrent_weight"] @ r + w[f + "recurrent_bias"]
        r = torch.tanh(z)
        read = mlp(w, p + "readout", layer_norm(w, p + "readout_norm", r, c.layernorm_epsilon))
        rho = torch.exp(w[p + "readout_log_scale"]) * read
    pair = layer_norm(w, p + "gate_norm", torch.cat((x, rho)), c.layernorm_epsilon)
    g = 1 / (1 + torch.exp(-mlp(w, p + "gate", pair)))
    m = g * rho + (1 - g) * x
    return m + w[p + "ffn_scale"] * mlp(w, p + "ffn", layer_norm(w, p + "ffn_norm", m, c.layernorm_epsilon)), r


def document_logits(w: dict[str, Tensor], c, ids: Tensor) -> Tensor:
    """Logits `[T, V]` of one document."""
    reservoirs = [torch.zeros(int(c.hidden_size * c.reservoir_multiple), dtype=torch.float64)] * c.num_layers
    rows = []
    for token in ids.tolist():
        x = w["embedding.weight"][token]
        for i in range(c.num_layers):
            x, reservoirs[i] = block(w, f"layers.{i}.", c, x, reservoirs[i])
        rows.append(w["embedding.weight"] @ layer_norm(w, "final_norm", x, c.layernorm_epsilon))
    return torch.stack(rows)


def documents_nats(w: dict[str, Tensor], c, ids: Tensor, lengths: list[list[int]]) -> Tensor:
    """Sum of -log p(next token) over the labelled positions of packed rows."""
    nats = torch.zeros((), dtype=torch.float64)
    for row, row_lengths in zip(ids, lengths, strict=True):
        for document in row.split(row_lengths):
            for logits, label in zip(document_logits(w, c, document)[:-1], document[1:], strict=True):
                nats = nats + torch.log(torch.exp(logits).sum()) - logits[label]
    return nats
