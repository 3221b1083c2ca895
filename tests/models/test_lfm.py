import copy
import itertools

import pytest
import torch

from lfm.data.batch import Batch
from lfm.evaluation.held_out import score
from lfm.inference.sampling import prefill
from lfm.layers.documents import Documents, Rows
from lfm.models.global_names import global_views, moving_names, stored
from lfm.models.initialization import initialize
from lfm.models.lfm import LFM, LFMConfig, initial_tensor
from lfm.models.losses import weighted
from lfm.objectives.next_token import NEXT_TOKEN
from tests.comparison import assert_close
from tests.losses import cross_entropy
from tests.models.reference_lfm import document_forward, step_loss
from tests.nested import nested


def small_config(**changes) -> LFMConfig:
    """A few thousand parameters and every kind of layer; sequential reservoir, so that equality is exact."""
    tree = {
        "hidden_size": 16,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 64,
        "vocab_size": 40,
        "vocab_size_multiple": 16,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 12,
        "liquid": {"interval": 2, "num_reservoirs": 2, "reservoir_size": 8, "backend": "sequential"},
    }
    liquid = tree["liquid"] | changes.pop("liquid", {}) if changes.get("liquid", {}) is not None else changes["liquid"]
    return LFMConfig.model_validate(nested(**(tree | changes | {"liquid": liquid})))


def small_model(dtype=torch.float64, **changes) -> LFM:
    """Initialised with larger weights than for training, so that every part of the function shows in the logits."""
    config = small_config(**{"initialization": "published", "init_method_std": 0.4} | changes)
    model = LFM(config)
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name in sorted(moving_names(model)):
        buffer = model.get_buffer(name)
        buffer.copy_(torch.randn(buffer.shape, generator=generator).softmax(0))
    return model.to(dtype)


UNIT = {"initialization": "unit", "init_method_std": 0.02}
VARIANTS = {
    "default": {},
    "post_norm": {"liquid": {"norm": "post"}},
    "untied": {"untie_embeddings_and_output_weights": True},
    "no_liquid": {"liquid": None},
    "trained_reservoir": {"liquid": {"train_reservoir": True}},
    "scaled_input": {"liquid": {"input_scaling": 0.3}},
    "unit": UNIT,
    "multipliers": {**UNIT, "embedding_multiplier": 3.0, "logit_multiplier": 0.5},
    "qk_norm": {"qk_norm": True},
    "bias": {"balance": {"kind": "bias", "coeff": 0.1}},
    "bias_and_loss_of_the_step": {"balance": {"kind": "bias", "mean_decay": None, "coeff": 0.1, "scope": "step"}},
    "loss_of_the_step": {"balance": {"coeff": 0.1, "scope": "step"}},
    "top1_mha": {"moe_router_topk": 1, "num_query_groups": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_the_equations(variant):
    model = small_model(**VARIANTS[variant])
    ids, lengths = torch.randint(0, 40, (2, 14)), [[14], [5, 1, 8]]
    weights = {
        n: t.clone().requires_grad_() for n, t in global_views(model, lambda _, t: t).items() if t.dtype != torch.bool
    }
    logits, _ = model(ids, doc_lengths=lengths)
    start = 0
    for length in lengths[1]:
        want, _ = document_forward(weights, model.config, ids[1, start : start + length])
        assert torch.allclose(logits[1, start : start + length], want, atol=1e-10)
        start += length

    documents = Documents.from_lengths(lengths, "cpu")
    c, terms = model.config, (*NEXT_TOKEN.terms, *model.config.terms)
    loss = weighted(terms, model.losses(Rows(ids, documents), NEXT_TOKEN).sums, documents.counts)
    loss.backward()
    want_loss = step_loss(weights, c, ids, lengths)
    want_loss.backward()
    assert torch.allclose(loss, want_loss, rtol=1e-12)
    parameters = dict(model.named_parameters())
    got = global_views(model, lambda name, _: parameters[name].grad if name in parameters else None)
    want = {name: weights[name].grad for name in got}
    if variant == "trained_reservoir":  # only the connections that exist are trained
        want = {n: g * (weights[n] != 0) if ".reservoirs." in n else g for n, g in want.items()}
    assert_close(got, want, 1e-9)


LONG = {"seq_length": 256, "liquid": {"backend": "auto", "reservoir_size": 64, "chunk_length": 32, "warmup": 32}}
"""Rows of 160 tokens are longer than a chunk and its warm-up, and training cuts them."""


@pytest.mark.parametrize("mode", ["train", "eval"])
@torch.no_grad()
def test_read_out_of_training_long_rows_are_isolated_causal_and_alike_in_any_split(mode):
    model = small_model(**LONG).train(mode == "train")
    ids, lengths = torch.randint(0, 40, (2, 160)), [[70, 90], [160]]
    logits, _ = model(ids, doc_lengths=lengths)
    other = ids.clone()
    other[0, 70:], other[1, 100:] = torch.randint(0, 40, (90,)), torch.randint(0, 40, (60,))
    moved, _ = model(other, doc_lengths=lengths)
    assert torch.equal(moved[0, :70], logits[0, :70]), "a document of its neighbour in the row"
    assert torch.equal(moved[1, :100], logits[1, :100]), "a token of those after it"
    apart = [model(part)[0][0] for part in (ids[:1, :70], ids[:1, 70:], ids[1:])]
    assert torch.allclose(torch.cat(apart), logits.flatten(0, 1), rtol=0, atol=1e-12)
    first, state = model(ids[1:, :101])
    rest, _ = model(ids[1:, 101:], state)
    assert torch.allclose(torch.cat((first, rest), 1)[0], logits[1], rtol=0, atol=1e-12)


def test_scores_of_long_rows_are_the_sums_of_their_documents_alone():
    model = small_model(**LONG)
    ids = torch.randint(0, 40, (1, 160))
    together, labels = score(model, Batch(ids, [[70, 90]]))
    parts = [score(model, Batch(part, [[part.shape[1]]])) for part in ids.split([70, 90], 1)]
    assert labels == 158 == sum(part[1] for part in parts)
    assert together == pytest.approx(sum(part[0] for part in parts), rel=1e-13)
    model.train()  # where chunks are used, and off by no more than the guard allows
    trained = float(cross_entropy(model, ids, Documents.from_lengths([[70, 90]], "cpu")))
    assert trained != together and trained == pytest.approx(together, rel=1e-3)


@torch.no_grad()
def test_generation_does_not_depend_on_how_a_long_prompt_is_read(monkeypatch):
    model = small_model(**LONG)
    prompt = torch.randint(0, 40, (160,)).tolist()
    whole, _ = prefill(model, prompt)
    monkeypatch.setattr("lfm.inference.sampling.PREFILL_TOKENS", 41)
    pieces, _ = prefill(model, prompt)
    assert torch.allclose(pieces, whole, rtol=0, atol=1e-12)


def test_exact_counts_of_the_flagship():
    sizes = {"num_attention_heads": 24, "num_query_groups": 8, "moe_ffn_hidden_size": 1408}
    config = LFMConfig(**nested(hidden_size=3072, num_layers=20, **sizes))
    counts = config.count_parameters()
    assert (counts.total, counts.trainable, counts.active) == (3_025_273_344, 3_021_341_184, 1_464_205_824)
    assert (counts.frozen, counts.active_non_embedding, counts.padding) == (3_932_160, 1_070_203_392, 2_359_296)
    assert config.padded_vocab_size == 129_024
    assert round(config.flops_per_token() / 1e9, 2) == 11.82
    # 14.85 GFLOP is what counting the attention core without the causal saving would give.
    assert round(config.flops_per_token(attended=8193.0) / 1e9, 2) == 14.84
    # By hand: attention projections, attention of 4096.5 keys, two experts, router; a liquid layer's projections and
    # its recurrence, whose frozen weights have no gradient; the head.
    plain = 3 * (50_331_648 + 50_337_792 + 51_904_512 + 49_152)
    assert config.layer_cost(1).flops == plain
    assert config.layer_cost(4).flops == plain + 3 * 18_874_368 + 2 * 1_572_864
    assert config.head_flops == 6 * 128_256 * 3072


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_built_model(variant):
    config = small_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = LFM(config)
    counts = config.count_parameters()
    assert sum(p.numel() for p in model.parameters()) == counts.trainable + counts.padding
    assert sum(b.numel() for n, b in model.named_buffers() if n.endswith("reservoirs")) == counts.frozen
    for number, layer in enumerate(model.layers.values()):
        assert sum(p.numel() for p in layer.parameters()) == config.layer_cost(number).trainable


def test_experts_and_reservoirs_have_global_names_of_their_own():
    index = stored(small_model(liquid={"train_reservoir": True}))
    assert {"layers.1.moe.experts.3.up.weight", "layers.0.liquid.reservoirs.1.connections"} <= index.keys()


@pytest.mark.parametrize("size", [64, 512])
def test_reservoirs_have_the_connectivity_and_spectral_radius_asked_for(size):
    config = small_config(liquid={"reservoir_size": size})
    draws = [
        initial_tensor(f"layers.{i}.liquid.reservoirs.{j}.weight", (size, size), config, 1)
        for i in (0, 2)
        for j in (0, 1)
    ]
    for weight in draws:
        assert 0.095 <= (weight != 0).double().mean() <= 0.105
        assert abs(torch.linalg.eigvals(weight.double()).abs().max() - 0.99) < 1e-3
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_the_drive_of_a_fresh_model_has_rms_near_one():
    config = small_config(hidden_size=256, num_attention_heads=4)
    model = LFM(config)
    initialize(model, 0)
    u = torch.randn(4, 32, 256)
    u = u / u.square().mean(-1, keepdim=True).sqrt()
    assert 0.9 < model.liquids[0].input(u).square().mean().sqrt() < 1.1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 3}, "hidden_size=16 over attention.num_attention_heads=3"),
        ({"num_query_groups": 3}, "attention.num_query_groups=3 does not divide 4 heads"),
        ({"moe_router_topk": 9}, "moe_router_topk=9 is more than num_moe_experts=4"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_as_near_to_float64_as_the_plain_path_in_bf16():
    config = {"hidden_size": 256, "num_attention_heads": 2, "num_query_groups": 1, "moe_ffn_hidden_size": 64}
    model = small_model(**config)
    plain = LFM(model.config)
    plain.load_state_dict({n: t.float() for n, t in model.state_dict().items()})
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    model.load_state_dict({n: t.double() for n, t in plain.state_dict().items()})
    fast = copy.deepcopy(plain).to("cuda")
    ids, lengths = torch.randint(0, 40, (2, 64)), [[64], [20, 44]]
    want = model(ids, doc_lengths=lengths)[0]
    errors = {}
    for name, found in (
        ("plain", plain(ids, doc_lengths=lengths)[0]),
        ("fast", fast(ids.cuda(), doc_lengths=lengths)[0]),
    ):
        errors[name] = (found.cpu().double() - want).norm(dim=-1).flatten() / want.norm(dim=-1).flatten()
    # Near-ties route differently in bf16, so that some positions are far off on either path; a quarter is not.
    assert errors["plain"].quantile(0.25) < 3e-2
    for quantile in (0.1, 0.25, 0.5):
        assert errors["fast"].quantile(quantile) < 1.25 * errors["plain"].quantile(quantile)
