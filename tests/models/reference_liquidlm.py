"""LiquidLM by its equations: one document, one token at a time; float64; no code of the model."""

import torch
from torch import Tensor

from tests.models.reference_lstm import lstm_layer


def reservoir_matrix(w: dict[str, Tensor], config) -> Tensor:
    """R `[reservoir_size, hidden_size]`: the stored values summed into their places."""
    dense = torch.zeros(config.reservoir_size, config.hidden_size, dtype=torch.float64)
    values, columns = w["reservoir.values"], w["reservoir.columns"]
    for row in range(len(values)):
        for value, column in zip(values[row].tolist(), columns[row].tolist(), strict=True):
            dense[row, column] += value
    return dense


def document_forward(w: dict[str, Tensor], config, ids: Tensor, masks: list[Tensor] | None = None) -> Tensor:
    """Logits `[T, V]` of one document.

    `masks`, in the order of the forward pass: what dropout multiplies the features, the output of each LSTM layer but
    the last, and the normalised output with; `[T, ...]` each.
    """
    masks = list(masks) if masks is not None else []
    dense = reservoir_matrix(w, config)
    rows = []
    for t, token in enumerate(ids.tolist()):
        angle = w["reservoir.phases"].double() * t
        rows.append(torch.tanh(dense @ w["embedding.weight"][token] + torch.sin(angle) + torch.cos(angle)))
    x = torch.stack(rows)
    for layer in range(config.num_layers):
        x = lstm_layer(w, layer, x * masks.pop(0) if masks else x)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + config.layernorm_epsilon)
    y = y * w["final_norm.weight"] + w["final_norm.bias"]
    y = y * masks.pop(0) if masks else y
    return torch.stack([w["head.weight"] @ row + w["head.bias"] for row in y])
