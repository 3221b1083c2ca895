import pytest
import torch

from lfm.layers.documents import Documents
from lfm.models.global_names import global_views
from lfm.models.initialization import initialize
from lfm.models.transformer import Transformer, TransformerConfig
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models.reference_transformer import batch_loss, document_forward
from tests.nested import nested

V = 40


def small_config(**changes) -> TransformerConfig:
    tree = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 20}
    return TransformerConfig.model_validate(
        nested(**(tree | {"seq_length": 32, "vocab_size": V, "vocab_size_multiple": 16} | changes))
    )


def small_model(dtype=torch.float64, **changes) -> Transformer:
    """Initialised with larger weights than for training, so that every part shows in the logits."""
    model = Transformer(small_config(**{"initialization": "published", "init_method_std": 0.4} | changes))
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def gradients_of(model) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return global_views(model, lambda name, _: parameters[name].grad)


VARIANTS = {
    "mqa": {"num_query_groups": 1},
    "gqa": {"num_query_groups": 2},
    "mha": {"num_query_groups": 4},
    "qk_norm": {"qk_norm": True},
    "unit": {
        **{"initialization": "unit", "init_method_std": 0.02, "untie_embeddings_and_output_weights": True},
        **{"embedding_multiplier": 3.0, "logit_multiplier": 0.5},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_the_equations(variant):
    model = small_model(**VARIANTS[variant])
    ids, lengths = torch.randint(0, V, (2, 14)), [[14], [5, 1, 8]]
    w = {n: t.clone().requires_grad_() for n, t in global_views(model, lambda _, t: t).items()}
    want = torch.cat([document_forward(w, model.config, part) for part in ids[1].split(lengths[1])])
    assert relative_error(model(ids, doc_lengths=lengths)[0][1], want) < 1e-12

    loss = cross_entropy(model, ids, Documents.from_lengths(lengths, "cpu"))
    loss.backward()
    want_loss = batch_loss(w, model.config, ids, lengths)
    want_loss.backward()
    assert relative_error(loss, want_loss) < 1e-12
    assert_close(gradients_of(model), {name: t.grad for name, t in w.items()}, 1e-9)


@pytest.mark.parametrize("num_query_groups", [1, 2, 4])
def test_counts_and_flops_equal_the_built_model(num_query_groups):
    config = small_config(num_query_groups=num_query_groups, seq_length=7)
    with torch.device("meta"):
        model = Transformer(config)
    counts, D = config.count_parameters(), config.hidden_size
    assert sum(p.numel() for p in model.parameters()) == counts.total + counts.padding
    assert counts.padding == 8 * D and counts.active_non_embedding == counts.total - V * D
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    # The mean query of 7 positions sees 4 keys: scores and values are D multiply-adds a key each.
    assert config.flops_per_token() == 6 * (matrices + 2 * 2 * D * 4 + V * D)


def test_the_empty_state_is_a_position_and_a_padding_a_layer():
    assert small_model().empty_state(2).num_bytes == 16 + 2 * 16  # int64


def test_initial_distributions():
    model = Transformer(small_config(initialization="published", hidden_size=128, num_layers=8, ffn_hidden_size=256))
    initialize(model, seed=0)
    for name, tensor in global_views(model, lambda _, t: t).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        else:
            want = 0.005 if name.endswith((".o.weight", "down.weight")) else 0.02
            assert abs(tensor.std() / want - 1) < 0.03 and abs(tensor.mean()) < 1e-3, name


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 3}, "hidden_size=16 over attention.num_attention_heads=3"),
        ({"num_query_groups": 3}, "attention.num_query_groups=3 does not divide 4 heads"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)
