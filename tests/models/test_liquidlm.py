import math

import pytest
import torch
import torch.nn.functional as F

from lfm.layers.documents import Documents
from lfm.models.global_names import global_views
from lfm.models.initialization import initialize
from lfm.models.liquidlm import LiquidLM, LiquidLMConfig, LiquidLMState, draw_reservoir
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models.reference_liquidlm import document_forward, reservoir_matrix

VARIANTS = {
    "default": {},
    "one_layer": {"num_layers": 1},
    "no_clock": {"phase_std": 0.0},
    "dense_reservoir": {"connectivity": 1.0},
}


def small_config(**changes) -> LiquidLMConfig:
    """A fast clock and many connections, so that both show within a few tokens."""
    tree = {
        "hidden_size": 12,
        "num_layers": 3,
        "reservoir_size": 20,
        "connectivity": 0.3,
        "reservoir_std": 0.4,
        "phase_std": 0.5,
        "seq_length": 32,
        "vocab_size": 40,
    }
    return LiquidLMConfig.model_validate(tree | changes)


def small_model(dtype=torch.float64, **changes) -> LiquidLM:
    model = LiquidLM(small_config(**changes))
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.startswith("final_norm"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def weights_of(model):
    return {
        name: tensor.clone().requires_grad_(name in dict(model.named_parameters()))
        for name, tensor in global_views(model, lambda _, tensor: tensor).items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_the_equations(variant):
    model = small_model(**VARIANTS[variant])
    ids, lengths = torch.randint(0, 40, (2, 11)), [[11], [5, 1, 5]]
    weights = weights_of(model)
    pieces = [
        document_forward(weights, model.config, document)
        for row, row_lengths in zip(ids, lengths, strict=True)
        for document in row.split(row_lengths)
    ]
    logits, _ = model(ids, doc_lengths=lengths)
    assert relative_error(logits.flatten(0, 1), torch.cat(pieces)) < 1e-12

    documents = Documents.from_lengths(lengths, "cpu")
    loss = cross_entropy(model, ids, documents)
    loss.backward()
    labels = documents.labels(ids).flatten()
    want_loss = F.cross_entropy(torch.cat(pieces), labels, reduction="sum", ignore_index=-100)
    want_loss.backward()
    assert torch.allclose(loss, want_loss, rtol=1e-12)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(got, {name: weights[name].grad for name in got}, 1e-9)


def test_dropout_acts_on_features_between_layers_and_before_the_head():
    model = small_model(hidden_dropout=0.4).train()
    ids = torch.randint(0, 40, (1, 9))
    torch.manual_seed(11)
    got, _ = model(ids)
    torch.manual_seed(11)
    masks = [F.dropout(torch.ones(1, 9, width, dtype=torch.float64), 0.4)[0] for width in (20, 12, 12, 12)]
    assert relative_error(got[0], document_forward(weights_of(model), model.config, ids[0], masks)) < 1e-12
    assert not torch.equal(model(ids)[0], got)
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_exact_counts_of_the_published_model():
    counts = LiquidLMConfig().count_parameters()
    assert (counts.total, counts.frozen, counts.trainable) == (153_363_545, 4_198_400, 149_165_145)
    assert counts.active_non_embedding == 149_165_145 - 2 * 50_265 * 1024 - 50_265
    # By hand: gates of the four layers and the head, three products each; the reservoir, two.
    gates = 4 * 1024 * (4096 + 1024) + 3 * 4 * 1024 * 2048
    assert LiquidLMConfig().flops_per_token() == 6 * (gates + 50_265 * 1024) + 4 * 4096 * 1024
    with torch.device("meta"):
        state = LiquidLM(LiquidLMConfig()).empty_state(1)
    assert state.num_bytes == 2 * 4 * 1024 * 4 + 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_built_model(variant):
    config = small_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = LiquidLM(config)
    counts = config.count_parameters()
    assert sum(p.numel() for p in model.parameters()) == counts.trainable
    assert model.reservoir.dense(torch.float32).numel() + model.reservoir.phases.numel() == counts.frozen
    assert counts.total == counts.trainable + counts.frozen
    embedding = model.embedding.weight.numel() + sum(p.numel() for p in model.head.parameters())
    assert counts.active_non_embedding == counts.active - embedding


def test_the_first_loss_of_the_published_model_is_the_derived_one():
    """Logits of variance 1/3 / (1 - dropout) before training: ln V + half of it."""
    config = LiquidLMConfig()
    with torch.device("meta"):
        model = LiquidLM(config)
    model.to_empty(device="cpu").train()
    initialize(model, seed=1)
    ids = torch.randint(0, config.vocab_size, (20, 20))
    documents = Documents.whole_rows(20, 20, "cpu")
    with torch.no_grad():
        loss = float(cross_entropy(model, ids, documents)) / documents.num_labels
    assert abs(loss - 11.10) < 0.05
    assert abs(loss - math.log(50_265) - 0.5 / 3 / 0.6) < 0.05


def test_initial_values_have_the_distributions_asked_for():
    config = LiquidLMConfig(hidden_size=256, reservoir_size=1024, num_layers=2, vocab_size=500)
    model = LiquidLM(config)
    initialize(model, seed=5)
    weights = dict(model.named_parameters())
    assert abs(weights["embedding.weight"].std() - 1) < 0.02 and abs(weights["embedding.weight"].mean()) < 0.02
    for name, weight in weights.items():
        if name.startswith(("lstm", "head")):
            assert weight.abs().max() <= 1 / 16 and abs(weight.std() * 16 - 3**-0.5) < 0.05, name
    assert (weights["final_norm.weight"] == 1).all() and (weights["final_norm.bias"] == 0).all()
    assert abs(model.reservoir.phases.std() - 0.01) < 0.001
    dense = model.reservoir.dense(torch.float32)
    connections = dense[dense != 0]
    assert abs(len(connections) / dense.numel() - 0.05) < 0.002 and abs(connections.std() - 0.1) < 0.003
    assert not torch.equal(draw_reservoir(config, 5)[0], draw_reservoir(config, 6)[0])


def test_the_published_reservoir_fits_its_rows_and_is_stored_in_a_fifth_of_the_matrix():
    config = LiquidLMConfig()
    values, columns = draw_reservoir(config, seed=1)
    assert values.shape == columns.shape == (4096, 96)
    assert (columns.sort(1).values.diff(dim=1) > 0).all()  # distinct within a row
    assert int(columns.min()) >= 0 and int(columns.max()) < 1024
    assert abs(int((values != 0).sum()) - 209_715) < 5 * (4096 * 1024 * 0.05 * 0.95) ** 0.5
    assert (values.numel() + columns.numel()) * 4 < 0.2 * 4096 * 1024 * 4


def test_the_stored_rows_are_the_matrix():
    model = small_model()
    assert torch.equal(model.reservoir.dense(torch.float64), reservoir_matrix(weights_of(model), model.config))


def test_a_row_with_more_connections_than_are_stored_is_refused():
    config = small_config(hidden_size=64, reservoir_size=200_000, connectivity=0.0195)
    with pytest.raises(ValueError, match="seed=0 gives a reservoir row 9 connections and 8 are stored; change seed"):
        draw_reservoir(config, seed=0)


@pytest.mark.parametrize("position", [0, 511, 100_000, 1_000_000])
def test_the_clock_is_exact_to_fp32_up_to_a_million_tokens(position):
    model = small_model(torch.float32, phase_std=0.01, reservoir_size=64)
    got = model.reservoir.phase(torch.tensor([[position]]))[0, 0]
    assert got.dtype == torch.float32
    frequencies = model.reservoir.phases.tolist()
    want = [math.sin(phi * position) + math.cos(phi * position) for phi in frequencies]
    assert (got.double() - torch.tensor(want, dtype=torch.float64)).abs().max() < 2e-7


def test_a_stream_goes_on_at_a_million_tokens_as_in_float64():
    exact, model = small_model(phase_std=0.01), small_model(torch.float32, phase_std=0.01)
    ids = torch.randint(0, 40, (2, 8))
    logits = []
    for m in (exact, model):
        state = m.empty_state(2)
        logits.append(m(ids, LiquidLMState(state.h, state.c, state.position + 1_000_000))[0])
    assert relative_error(logits[1], logits[0]) < 1e-5


def test_frozen_tensors_get_no_gradient_and_never_change():
    model = small_model(torch.float32).train()
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sorted(frozen) == ["reservoir.columns", "reservoir.phases", "reservoir.values"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(0, 40, (2, 8))
        cross_entropy(model, ids, Documents.whole_rows(2, 8, "cpu")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(buffer, frozen[name]) and buffer.grad is None for name, buffer in model.named_buffers())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_near_float64_on_the_cpu():
    model = small_model(hidden_size=64, reservoir_size=256, connectivity=0.1)
    fast = LiquidLM(model.config).to("cuda").eval()
    fast.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    for parameter in fast.parameters():
        parameter.data = parameter.data.bfloat16()
    model.load_state_dict({name: tensor.double().cpu() for name, tensor in fast.state_dict().items()})
    ids = torch.randint(0, 40, (2, 32))
    for lengths in ([[32], [32]], [[32], [20, 12]]):
        got, want = fast(ids.cuda(), doc_lengths=lengths)[0], model(ids, doc_lengths=lengths)[0]
        assert relative_error(got.cpu(), want) < 3e-2
        losses = cross_entropy(fast, ids.cuda(), Documents.from_lengths(lengths, "cuda"))
        losses.backward()
        model.zero_grad()
        cross_entropy(model, ids, Documents.from_lengths(lengths, "cpu")).backward()
        gradients = dict(model.named_parameters())
        for name, parameter in fast.named_parameters():
            assert relative_error(parameter.grad.cpu(), gradients[name].grad) < 6e-2, name
        fast.zero_grad()
