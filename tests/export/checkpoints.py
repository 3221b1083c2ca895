"""Checkpoints of small models of every family, as a run would have left them, without training one."""

import json
from pathlib import Path
from typing import Any

import torch

from lfm.checkpoint.saver import Saver
from lfm.data.tokenizer import Tokenizer
from lfm.export.source import expected_tensors
from lfm.models.global_names import global_views
from lfm.models.initialization import initialize
from lfm.models.registry import build, parse

SIZES = {"hidden_size": 32, "seq_length": 320, "vocab_size": 512}
ATTENTION = {"num_attention_heads": 4, "num_query_groups": 2}
TREES: dict[str, dict[str, Any]] = {
    "lfm": {
        **{"kind": "lfm", "num_layers": 3, "vocab_size_multiple": 256, "attention": ATTENTION},
        "liquid": {"kind": "reservoir", "interval": 2, "num_reservoirs": 2, "reservoir_size": 16},
        "ffn": {"kind": "moe", "num_moe_experts": 4, "moe_ffn_hidden_size": 32},
    },
    "transformer": {
        **{"kind": "transformer", "num_layers": 2, "attention": ATTENTION, "ffn": {"ffn_hidden_size": 48}},
        "untie_embeddings_and_output_weights": True,
    },
    "liquidnet": {"kind": "liquidnet", "num_layers": 2, "ffn": {"ffn_hidden_size": 48}},
    "liquidlm": {"kind": "liquidlm", "num_layers": 2, "reservoir_size": 64, "connectivity": 0.3},
    "liquidnn": {"kind": "liquidnn", "num_fast": 1, "num_deep": 1},
    "laerc": {"kind": "laerc", "num_layers": 2, "reservoir_multiple": 2},
    "lstm": {"kind": "lstm", "num_layers": 2},
}
VARIANTS = {
    "lfm_trained_reservoir": TREES["lfm"] | {"liquid": {"kind": "reservoir", "train_reservoir": True}},
    "lfm_diagonal_swiglu": TREES["lfm"]
    | {"liquid": {"kind": "diagonal"}, "ffn": {"kind": "swiglu", "ffn_hidden_size": 48}},
}


def checkpoint_of(tree: dict[str, Any], tokenizer: Tokenizer, folder: Path, *, steps: int = 7) -> Path:
    """The run folder `folder`, with one checkpoint and a record."""
    config = parse(SIZES | tree, source="a test")
    model = build(config)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # so that no tensor is as it was drawn, zero or one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    expected = expected_tensors(config)
    views = global_views(model, lambda _, tensor: tensor)
    moe, layers = getattr(config, "moe", None), [str(layer) for layer in range(config.num_layers)]
    routers = layers if moe is not None else []
    manifest = {
        "config": {
            **{"name": folder.name, "seed": 0, "model": config.model_dump(mode="json")},
            "data": {"path": "/somewhere/stories"},
            "samples": {"sampling": {"greedy": False, "temperature": 0.8, "top_k": 40, "top_p": 0.9}},
        },
        "progress": {
            **{"step": steps, "tokens": steps * 1000, "best_validation": 5.25, "validations_without_gain": 0},
            **{"chain": "0" * 32, "skips": []},
        },
        "counters": {
            "optimizer_step": steps,
            "reservoir_warmup": {str(layer): config.reservoir_warmup for layer in config.reservoir_layers},
            "reservoir_calm_steps": {str(layer): 3 for layer in config.reservoir_layers},
            "router_idle_steps": {layer: [0] * moe.num_moe_experts for layer in routers},
            "router_uneven_steps": dict.fromkeys(routers, 0),
        },
        "data": {"position": 0, "seed": 0, "data_checksum": "none"},
    }
    tensors = {f"{expected[name].kind}.{name}": view for name, view in views.items()}
    Saver(folder / "checkpoints", keep=1, asynchronous=False).save(steps, tensors, manifest, tokenizer.definition)
    record = {"step": steps, "cross_entropy": 5.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return folder
