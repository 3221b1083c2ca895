"""Every family computes under its layouts what one process computes; of lfm, here, one of other parts than usual."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.layout.layout import check_layout
from lfm.models.registry import parse
from lfm.training.certificate import LAYOUTS, Numbers, Problem, certify, in_one_process
from lfm.training.optimizer.adamw import AdamWConfig
from tests.nested import nested

SIZES = {"hidden_size": 16, "seq_length": 32, "vocab_size": 90}
FFN = {"num_layers": 3, "ffn_hidden_size": 24, "vocab_size_multiple": 32}
FACTORS = {"embedding_multiplier": 3.0, "logit_multiplier": 0.5}
CHUNKED = {"backend": "chunked", "chunk_length": 8, "warmup": 32}
MODELS = {
    "transformer": nested(
        **FFN, embedding_multiplier=3.0, logit_multiplier=0.5, num_attention_heads=4, num_query_groups=2
    ),
    "lfm": nested(**FFN, attention=None, liquid={"kind": "diagonal", "interval": 2}),
    "liquidnet": nested(**FFN),
    "laerc": {"num_layers": 3, **CHUNKED},
    "liquidlm": {"num_layers": 2, "reservoir_size": 24, "hidden_dropout": 0.0},
    "liquidnn": {"num_fast": 1, "num_deep": 1, "dropout": 0.0, "plastic_from": 0.0},
    "lstm": {"num_layers": 2},
}
QUICK = {
    "transformer": "tp2",
    "lfm": "tp2",
    "liquidnet": "tp2",
    "liquidlm": "dp2_z2",
}
"""Of the families; the others' take as long, and compose the same parts."""
ZERO = ("dp2_z1", "dp2_z2", "dp2_z3")
EVERY = {
    "transformer": (*ZERO, "tp2", "pp2", "pp2_interleaved", "tp2_pp2", "tp2_dp2_z2", "dp2_z3_recompute"),
    "lfm": ("dp2_z2", "pp2_interleaved", "tp2_pp2", "tp2_dp2_z3"),
    "liquidnet": (*ZERO, "tp2", "pp2", "tp2_pp2"),
    "laerc": (*ZERO, "pp2"),
    "liquidlm": ZERO,
    "liquidnn": ("dp2_z1",),
    "lstm": ZERO,
}


def problem(kind: str, recompute="none") -> Problem:
    layers = {"num_layers": 4} if kind in ("transformer", "lfm") else {}
    model = parse({"kind": kind, **SIZES, **MODELS[kind], **layers}, source="a test")
    optimizer = AdamWConfig(lr=1e-2, clip_grad=0.5)
    return Problem(model, optimizer, seed=5, rows=8, micro_batch_size=1, steps=2, recompute=recompute)


@pytest.fixture(scope="module")
def expected() -> dict[str, Numbers]:
    """By family, as they are asked for."""
    return {}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if name == QUICK.get(kind) else pytest.mark.slow)
        for kind, names in EVERY.items()
        for name in names
    ],
)
def test_a_layout_of_a_family_computes_what_one_process_computes(kind, name, expected):
    world, parallel, recompute = LAYOUTS[name]
    asked = problem(kind, recompute)
    if kind not in expected:
        expected[kind] = in_one_process(problem(kind), "cpu")
    layout = check_layout(asked.model, parallel, world, global_batch_size=8, micro_batch_size=1)
    found = certify(layout, asked, expected[kind], device_type="cpu")
    assert found.beyond == []
