"""What layers declare of their tensors."""

import pytest
import torch
from torch import nn

from lfm.layers.stored import Stored
from lfm.models.global_names import stored
from lfm.models.lfm import LFMConfig
from lfm.models.liquidnet import LiquidNetConfig
from lfm.models.registry import build
from lfm.models.transformer import TransformerConfig
from tests.nested import nested

SIZES = {"hidden_size": 16, "num_layers": 2, "seq_length": 8, "vocab_size": 10, "vocab_size_multiple": 8}
HEADS = {"num_attention_heads": 2, "num_query_groups": 1}
CUT = {
    "lfm": LFMConfig.model_validate(nested(**SIZES, **HEADS, moe_ffn_hidden_size=8, num_moe_experts=2)),
    "lfm_untied": LFMConfig.model_validate(
        {
            **nested(**SIZES, **HEADS, moe_ffn_hidden_size=8, num_moe_experts=2),
            "untie_embeddings_and_output_weights": True,
            "liquid": {"train_reservoir": True, "reservoir_size": 4, "num_reservoirs": 2},
        }
    ),
    "transformer": TransformerConfig.model_validate(nested(**SIZES, **HEADS, ffn_hidden_size=24)),
    "lfm_of_other_parts": LFMConfig.model_validate(
        nested(**SIZES, ffn_hidden_size=24, attention=None, liquid={"kind": "diagonal", "interval": 1})
    ),
    "liquidnet": LiquidNetConfig.model_validate(nested(**SIZES, ffn_hidden_size=24)),
}


@pytest.mark.parametrize("name", CUT)
def test_families_that_tensor_parallelism_cuts_declare_every_tensor(name):
    with torch.device("meta"):
        model = build(CUT[name])
    found = stored(model, must_declare=True)
    assert {where.tensor for where in found.values()} == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert (
        found[
            "layers.1.liquid.delta.bias"
            if name in ("liquidnet", "lfm_of_other_parts")
            else "layers.0.attention.k.weight"
        ].cut
        == 0
    )


def test_a_tensor_that_no_layer_declares_is_named():
    with torch.device("meta"):
        model = build(CUT["transformer"])
        layer = model.get_submodule("layers.1")
        layer.register_buffer("extra", torch.empty(3))
    assert stored(model)["layers.1.extra"] == Stored("layers.1.extra")
    with pytest.raises(AssertionError, match=r"layers\.1\.extra: no layer's stored\(\) says how tensor parallelism"):
        stored(model, must_declare=True)


def test_names_are_relative_to_the_layer_and_undeclared_ones_their_own():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.empty(4, 3))
            self.other = nn.Parameter(torch.empty(3))

        def stored(self):
            return {
                "a.weight": Stored("both", (slice(0, 2),), cut=1),
                "b.weight": Stored("both", (slice(2, 4),), cut=1),
            }

    assert stored(nn.ModuleDict({"x": Fused()})) == {
        "x.a.weight": Stored("x.both", (slice(0, 2),), cut=1),
        "x.b.weight": Stored("x.both", (slice(2, 4),), cut=1),
        "x.other": Stored("x.other"),
    }
