"""What is said of a checkpoint that is of another model: the key that says it best, and a way out that is one."""

from pathlib import Path

import pytest

from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.matching import check_architecture
from lfm.errors import UserError
from lfm.models.registry import parse

SAVED = Path(__file__).parents[1] / "golden/format_2/lfm/step_00000002"
DIAGONAL = {"kind": "diagonal", "interval": 2}


def checked(**changes) -> None:
    manifest = read_manifest(SAVED)
    model = parse({**manifest["config"]["model"], **changes}, source="a test")
    check_architecture(SAVED, manifest, model, way_out="take a walk")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"liquid": DIAGONAL}, "model.liquid.kind is 'reservoir' there and 'diagonal' in the config"),
        ({"liquid": None}, "model.liquid is of kind reservoir there and null in the config"),
        ({"ffn": {"kind": "swiglu", "ffn_hidden_size": 16}}, "model.ffn.kind is 'moe' there and 'swiglu'"),
        ({"attention": None}, "model.attention is set there and null"),
        ({"attention": {"num_attention_heads": 4, "num_query_groups": 1}}, "model.attention.num_attention_heads is 2"),
        ({"hidden_size": 32}, "model.hidden_size is 16 there and 32 in the config"),
        ({"initialization": "unit"}, "model.initialization is 'published' there and 'unit'"),
        ({"initialization": "unit", "embedding_multiplier": 2.0}, "model.initialization is 'published' there"),
    ],
)
def test_the_first_difference_is_named_with_the_way_out(changes, words):
    with pytest.raises(UserError) as caught:
        checked(**changes)
    assert words in str(caught.value) and str(caught.value).endswith("set it alike, or take a walk")


def test_another_family_is_named():
    manifest = read_manifest(SAVED)
    model = parse({"kind": "lstm", "hidden_size": 16, "num_layers": 1}, source="a test")
    with pytest.raises(UserError, match=r"is of family lfm and the config of family lstm; .*, or take a walk"):
        check_architecture(SAVED, manifest, model, way_out="take a walk")


def test_keys_that_a_run_may_change_are_no_difference():
    attention = {"num_attention_heads": 2, "num_query_groups": 1, "backend": "reference"}
    checked(seq_length=64, attention=attention)
