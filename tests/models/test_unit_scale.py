"""The unit initialization: what it is for (tokens that stay apart, a first loss of guessing), on rows of real text."""

import itertools
import math

import pytest
import torch

from lfm.data.stream import DataConfig, open_training
from lfm.layers.documents import Documents, Rows
from lfm.layers.residual import ResidualStream
from lfm.models.initialization import initialize
from lfm.models.registry import build, parse
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.groups import parameter_groups
from tests.nested import nested

LENGTH, VOCAB = 64, 512
SHAPE = {"seq_length": LENGTH, "vocab_size": VOCAB, "vocab_size_multiple": 64, "num_attention_heads": 4}
FAMILIES = {
    "lfm": {
        **{"num_query_groups": 2, "num_moe_experts": 8, "moe_ffn_hidden_size": 96},
        "liquid": {"num_reservoirs": 2, "reservoir_size": 32, "backend": "sequential"},
    },
    "lfm_diagonal": {"num_query_groups": 2, "ffn_hidden_size": 256, "liquid": {"kind": "diagonal", "interval": 2}},
    "transformer": {"num_query_groups": 4, "ffn_hidden_size": 256},
}
UNTIED = {"untie_embeddings_and_output_weights": True}


def config_of(name: str, **changes):
    tree = nested(**(SHAPE | FAMILIES[name] | {"hidden_size": 128, "num_layers": 8} | changes))
    return parse({"kind": name.partition("_")[0], **tree}, source="a test")


@pytest.fixture(scope="module")
def ids(text_data) -> torch.Tensor:
    """1,024 tokens of code."""
    reader = open_training(DataConfig(path=str(text_data)), seq_length=LENGTH, vocab_size=VOCAB, rows_per_step=1)
    return torch.as_tensor(reader.read(range(16)).ids).long()


def first_pass(config, ids: torch.Tensor) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """The loss, the stream before each layer and behind the last, with gradients, and what the last parts take."""
    model = build(config)
    initialize(model, seed=1)
    normed: list[torch.Tensor] = []
    for block in model.layers.values():
        norm = block.moe_norm if hasattr(block, "moe_norm") else block.mlp_norm
        norm.add_norm = _kept(norm.add_norm, normed)
    x = model.embed(ids)
    context = model.context(Rows(ids, Documents.whole_rows(*ids.shape, ids.device)), x.dtype)
    kept = [x]
    for block in model.layers.values():
        kept.append(block(ResidualStream(kept[-1]), context, None, None)[0].summed())
    for each in kept:
        each.retain_grad()
    logits = model.head.logits(model.final_norm(kept[-1]))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), kept, normed


def _kept(add_norm, into):
    def wrapped(x, y):
        x, normed = add_norm(x, y)
        into.append(normed.detach())
        return x, normed

    return wrapped


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def mean_cosine(u: torch.Tensor) -> float:
    """Between two different tokens."""
    u = torch.nn.functional.normalize(u.flatten(0, 1).double(), dim=-1)
    return float((u.sum(0).square().sum() - len(u)) / (len(u) * (len(u) - 1)))


@pytest.mark.parametrize("changes", [{}, UNTIED, {"hidden_size": 256}, {"num_layers": 24}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_and_its_gradient_keep_their_size_over_all_layers(name, changes, ids):
    config = config_of(name, **changes)
    loss, kept, _ = first_pass(config, ids)
    sizes, gradients = [rms(x) for x in kept], [rms(x.grad) for x in kept]
    assert 0.9 < sizes[0] < 1.1
    assert all(0.9 < size < 1.5 for size in sizes), sizes
    assert all(before <= after * 1.01 for before, after in itertools.pairwise(sizes)), sizes
    assert max(gradients) < 2 * min(gradients), gradients
    assert abs(loss - math.log(VOCAB)) < 0.4


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_stay_apart_in_every_layer_and_with_the_published_initialization_do_not(name, ids):
    size = {"hidden_size": 512, "num_layers": 3}
    unit, published = (
        [mean_cosine(u) for u in first_pass(config_of(name, **size, initialization=how), ids)[2]]
        for how in ("unit", "published")
    )
    assert len(unit) == 3 and max(unit) < 0.1, unit
    assert max(published) > 0.2, published


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_that_write_to_the_stream_take_a_share_of_the_learning_rate_and_decay_as_the_others(name):
    model = build(config_of(name))
    optimizer = AdamWConfig.model_validate({"groups": [{"match": "layers.0.*", "lr_multiple": 0.5}]})
    groups = parameter_groups(optimizer, model.named_parameters(), multiple=model.config.lr_multiple)
    parts = {"lfm": 2 * 8 + 2, "lfm_diagonal": 2 * 8 + 4, "transformer": 2 * 8}[name]
    writing = {"attention.out.weight", "moe.down", "mlp.down.weight", "liquid.output.weight"}
    seen = set()
    for group in groups:
        for parameter in group.named:
            expected = 0.5 if parameter.startswith("layers.0.") else 1.0
            writes = any(parameter.endswith(end) for end in writing)
            seen |= {end for end in writing if parameter.endswith(end)}
            assert group.lr_multiple == pytest.approx(expected * (3 / parts if writes else 1))
            if model.get_parameter(parameter).dim() > 1:
                share = group.lr_multiple / expected
                assert group.weight_decay * share == pytest.approx(optimizer.weight_decay)
    assert len(seen) == (3 if name != "transformer" else 2)
    published = config_of(name, initialization="published")
    assert {published.lr_multiple(parameter) for parameter, _ in model.named_parameters()} == {1.0}


def test_a_rate_for_one_width_is_less_for_wider_models():
    assert AdamWConfig(lr=3e-4).peak_lr(3072) == 3e-4
    assert AdamWConfig(lr=3e-4, lr_at_width=1024).peak_lr(3072) == pytest.approx(1e-4)
    assert AdamWConfig(lr=3e-4, lr_at_width=1024).peak_lr(512) == pytest.approx(6e-4)


def test_the_embedding_multiplier_is_a_number_in_every_config():
    assert config_of("lfm").model_dump()["embedding_multiplier"] == pytest.approx(128 / 3)
    assert config_of("lfm", embedding_multiplier=7.0).embedding_multiplier == 7.0
    assert config_of("lfm", initialization="published").model_dump()["embedding_multiplier"] == 1.0
