"""A small model of each family, whose layers all do something and whose logits lie far apart."""

import torch

from lfm.models.registry import build, parse

SIZES = {
    "lfm": {
        "hidden_size": 32,
        "num_layers": 2,
        "seq_length": 128,
        "vocab_size_multiple": 1,
        "attention": {"num_attention_heads": 4, "num_query_groups": 2},
        "liquid": {"kind": "reservoir", "interval": 2, "num_reservoirs": 1, "reservoir_size": 16},
        "ffn": {"kind": "moe", "num_moe_experts": 4, "moe_ffn_hidden_size": 16},
    },
    "laerc": {"hidden_size": 16, "num_layers": 2},
    "liquidlm": {"hidden_size": 16, "reservoir_size": 32},
    "liquidnn": {"hidden_size": 16},
    "liquidnet": {"hidden_size": 16, "num_layers": 2, "ffn": {"ffn_hidden_size": 24}, "vocab_size_multiple": 1},
    "transformer": {
        "hidden_size": 16,
        "num_layers": 2,
        "seq_length": 128,
        "ffn": {"ffn_hidden_size": 24},
        "attention": {"num_attention_heads": 4, "num_query_groups": 2},
        "vocab_size_multiple": 1,
    },
    "lstm": {"hidden_size": 16, "num_layers": 2},
}
V = 300


def make(kind, **changes):
    model = build(parse({"kind": kind, "vocab_size": V, **SIZES[kind], **changes}, source="a test")).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # logits far apart, and layers that do something
            if parameter.dim() > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model
