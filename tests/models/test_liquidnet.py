import math

import pytest
import torch

from lfm.layers.documents import Documents
from lfm.layers.mlp import SwiGLUConfig
from lfm.models.global_names import global_views
from lfm.models.initialization import initialize
from lfm.models.liquidnet import LiquidNet, LiquidNetConfig
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models.reference_liquidnet import batch_loss, document_forward
from tests.nested import nested

V = 40


def small_config(**changes) -> LiquidNetConfig:
    tree = {"hidden_size": 12, "num_layers": 3, "ffn_hidden_size": 20, "seq_length": 32, "vocab_size": V}
    return LiquidNetConfig.model_validate(nested(**(tree | {"vocab_size_multiple": 16} | changes)))


def small_model(dtype=torch.float64, **changes) -> LiquidNet:
    """With larger weights than a fresh model's, none of them zero, so that every part shows in the logits."""
    model = LiquidNet(small_config(**{"init_method_std": 0.5} | changes))
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        size = model.config.init_method_std if name.endswith(("output.weight", "down.weight")) else 0.1
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {n: t.clone().requires_grad_() for n, t in global_views(model, lambda _, t: t).items()}


def gradients_of(model) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return global_views(model, lambda name, _: parameters[name].grad)


def test_logits_states_loss_and_every_gradient_equal_the_equations():
    model, ids, lengths = small_model(), torch.randint(0, V, (2, 14)), [[14], [5, 1, 8]]
    w = weights_of(model)
    logits, state = model(ids, doc_lengths=lengths)
    want, hidden = zip(*(document_forward(w, model.config, part) for part in ids[1].split(lengths[1])), strict=True)
    assert relative_error(logits[1], torch.cat(want)) < 1e-12
    assert all(relative_error(h[1], wanted) < 1e-12 for h, wanted in zip(state.hidden, hidden[-1], strict=True))

    loss = cross_entropy(model, ids, Documents.from_lengths(lengths, "cpu"))
    loss.backward()
    want_loss = batch_loss(w, model.config, ids, lengths)
    want_loss.backward()
    assert relative_error(loss, want_loss) < 1e-12
    assert_close(gradients_of(model), {name: t.grad for name, t in w.items()}, 1e-9)


@pytest.mark.parametrize(
    "shape, total",
    [((192, 4, 576), 11_602_368), ((384, 6, 1024), 29_990_016), ((768, 8, 2560), 104_811_264)],
    ids=["tiny", "small", "base"],
)
def test_published_sizes(shape, total):
    """Printed as 11.6 M (exactly 11,602,368), 30 M and 104.8 M."""
    hidden_size, num_layers, ffn_hidden_size = shape
    config = LiquidNetConfig(
        hidden_size=hidden_size, num_layers=num_layers, ffn=SwiGLUConfig(ffn_hidden_size=ffn_hidden_size)
    )
    counts = config.count_parameters()
    assert config.padded_vocab_size == 50_432
    assert (counts.total, counts.trainable, counts.active) == (total,) * 3
    assert counts.active_non_embedding == total - 50_432 * hidden_size
    assert (counts.frozen, counts.padding) == (0, 0)


def test_counts_and_flops_equal_the_built_model():
    config = small_config()
    with torch.device("meta"):
        model = LiquidNet(config)
    counts = config.count_parameters()
    assert sum(p.numel() for p in model.parameters()) == counts.total
    assert not dict(model.named_buffers())
    matrices = sum(p.numel() for name, p in model.layers.named_parameters() if p.dim() == 2)
    assert config.flops_per_token() == 6 * (matrices + V * config.hidden_size)


def test_small_state_is_2304_floats():
    with torch.device("meta"):
        model = LiquidNet(LiquidNetConfig()).bfloat16()
    state = model.empty_state(1)
    assert state.num_bytes == 4 * 2304 and state.hidden[0].dtype == torch.float32


def test_hidden_states_stay_within_one():
    model = small_model(torch.float32)
    for parameter in model.parameters():
        parameter.data *= 20
    _, state = model(torch.randint(0, V, (8, 300)))
    assert all(h.abs().max() <= 1 for h in state.hidden)


@pytest.mark.parametrize("hidden_size", [1, 192, 768])
def test_half_lives_at_initialisation_are_log_spaced_from_1_to_4096_tokens(hidden_size):
    model = LiquidNet(small_config(hidden_size=hidden_size, num_layers=1))
    initialize(model, seed=0)
    bias = global_views(model, lambda _, t: t)["layers.0.liquid.delta.bias"]
    assert bias.dtype == torch.float32
    delta = bias.double().exp().log1p() + 1e-5
    tau = [4096 ** (k / max(1, hidden_size - 1)) for k in range(hidden_size)]
    want = torch.tensor(tau, dtype=torch.float64)
    assert ((math.log(2) / delta) / want - 1).abs().max() < 1e-5


def test_a_fresh_layer_halves_its_state_after_its_half_life():
    """No input at all: z = 0, so v = 0 and only the decay acts."""
    model = LiquidNet(small_config(hidden_size=13, num_layers=1))
    initialize(model, seed=0)
    _, final = model.layers["0"].liquid(torch.zeros(1, 64, 13), state=torch.ones(1, 13))
    want = torch.tensor([2.0 ** (-64 / 2**k) for k in range(13)])
    torch.testing.assert_close(final[0], want, rtol=1e-4, atol=0)


def test_initial_distributions():
    config = small_config(hidden_size=128, ffn_hidden_size=256)
    model = LiquidNet(config)
    initialize(model, seed=0)
    views = global_views(model, lambda _, t: t)
    for name, tensor in views.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith(("liquid.output.weight", "mlp.down.weight")):
            assert (tensor == 0).all(), name
        elif not name.endswith("delta.bias"):
            assert abs(tensor.std() / 0.02 - 1) < 0.03 and abs(tensor.mean()) < 1e-3, name
    again = LiquidNet(config)
    initialize(again, seed=1)
    other = global_views(again, lambda _, t: t)["layers.0.liquid.value.weight"]
    drawn = [views[f"layers.{i}.liquid.{n}.weight"] for i in (0, 1) for n in ("value", "delta", "gate")] + [other]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_fresh_model_predicts_nothing():
    """Loss ln V up to the spread of N(0, 0.02) logits: the published 10.80 at step 0 is ln 50,257 = 10.82."""
    model, ids = LiquidNet(small_config(hidden_size=64)), torch.randint(0, V, (4, 32))
    initialize(model, seed=0)
    documents = Documents.whole_rows(4, 32, "cpu")
    assert abs(cross_entropy(model, ids, documents) / documents.num_labels - math.log(V)) < 0.05


def test_a_floor_of_decay_above_the_longest_half_life_is_refused():
    with pytest.raises(ValueError, match=r"delta_min=0\.001 allows no half-life of 4096 tokens.*below 0\.000169"):
        small_config(delta_min=1e-3)
