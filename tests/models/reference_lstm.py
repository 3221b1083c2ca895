"""The LSTM family by its equations: one document, one token at a time, one gate at a time; float64; no shared code."""

import torch
from torch import Tensor


def lstm_layer(w: dict[str, Tensor], layer: int, inputs: Tensor) -> Tensor:
    """Hidden states `[T, D]` of one layer over `inputs [T, I]` from a zero state."""
    ih, hh, bias_ih, bias_hh = (w[f"lstm.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    D = hh.shape[1]
    h, c = inputs.new_zeros(D), inputs.new_zeros(D)
    states = []
    for x in inputs:
        i, f, g, o = (
            ih[k * D : (k + 1) * D] @ x
            + bias_ih[k * D : (k + 1) * D]
            + hh[k * D : (k + 1) * D] @ h
            + bias_hh[k * D : (k + 1) * D]
            for k in range(4)
        )
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states)


def document_forward(w: dict[str, Tensor], config, ids: Tensor) -> Tensor:
    """Logits `[T, V]` of one document, without dropout."""
    x = w["embedding.weight"][ids]
    for layer in range(config.num_layers):
        x = lstm_layer(w, layer, x)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + config.layernorm_epsilon)
    return x * scale * w["final_norm.weight"] @ w["embedding.weight"].T
