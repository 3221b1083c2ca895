import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.layers.documents import Documents
from lfm.models.global_names import global_index, global_views
from lfm.models.language_model import initialize
from lfm.models.liquidnet import LiquidNet, LiquidNetConfig, LiquidNetState
from lfm.models.transformer import TransformerState
from tests.comparison import assert_close, relative_error
from tests.models.reference_liquidnet import batch_loss, document_forward

V = 40


def small_config(**changes) -> LiquidNetConfig:
    tree = {"hidden_size": 12, "num_layers": 3, "ffn_hidden_size": 20, "seq_length": 32, "vocab_size": V}
    return LiquidNetConfig.model_validate(tree | {"vocab_size_multiple": 16} | changes)


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


def streamed(model, ids, sizes):
    state, logits = None, []
    for part in ids.split(sizes, dim=1):
        out, state = model(part, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def test_logits_states_loss_and_every_gradient_equal_the_equations():
    model, ids, lengths = small_model(), torch.randint(0, V, (2, 14)), [[14], [5, 1, 8]]
    w = weights_of(model)
    logits, state = model(ids, doc_lengths=lengths)
    want, hidden = zip(*(document_forward(w, model.config, part) for part in ids[1].split(lengths[1])), strict=True)
    assert relative_error(logits[1], torch.cat(want)) < 1e-12
    assert all(relative_error(h[1], wanted) < 1e-12 for h, wanted in zip(state.hidden, hidden[-1], strict=True))

    losses = model.losses(ids, Documents.from_lengths(lengths, "cpu"))
    losses.cross_entropy.backward()
    want_loss = batch_loss(w, model.config, ids, lengths)
    want_loss.backward()
    assert relative_error(losses.cross_entropy, want_loss) < 1e-12
    assert_close(gradients_of(model), {name: t.grad for name, t in w.items()}, 1e-9)


@pytest.mark.parametrize(
    "shape, total",
    [((192, 4, 576), 11_602_368), ((384, 6, 1024), 29_990_016), ((768, 8, 2560), 104_811_264)],
    ids=["tiny", "small", "base"],
)
def test_published_sizes(shape, total):
    """Printed as 11.6 M (exactly 11,602,368), 30 M and 104.8 M."""
    hidden_size, num_layers, ffn_hidden_size = shape
    config = LiquidNetConfig(hidden_size=hidden_size, num_layers=num_layers, ffn_hidden_size=ffn_hidden_size)
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


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_split_of_a_sequence_gives_the_same_logits_and_state(sizes):
    model = small_model().eval()
    ids = torch.randint(0, V, (2, sum(sizes)), generator=torch.Generator().manual_seed(len(sizes)))
    (logits, state), (want, want_state) = streamed(model, ids, sizes), model(ids)
    assert (logits - want).abs().max() < 1e-9
    assert_close(state.tensors(), want_state.tensors(), 1e-9)


def test_prompt_then_one_token_at_a_time_in_fp32():
    model, ids = small_model(torch.float32).eval(), torch.randint(0, V, (2, 60))
    assert (streamed(model, ids, [10] + [1] * 50)[0] - model(ids)[0]).abs().max() < 1e-4


def test_the_empty_state_is_no_state_and_a_state_can_be_continued_twice():
    model, ids = small_model().eval(), torch.randint(0, V, (2, 9))
    assert torch.equal(model(ids, model.empty_state(2))[0], model(ids)[0])
    _, state = model(ids)
    first, _ = model(ids[:, :3], state)
    model(ids[:, 3:], state)
    assert torch.equal(model(ids[:, :3], state)[0], first)


def test_states_of_several_prefixes_continue_in_one_batch():
    model, following = small_model().eval(), torch.randint(0, V, (3, 6))
    prompts = [torch.randint(0, V, (1, n)) for n in (3, 17, 1)]
    together, _ = model(following, LiquidNetState.stack([model(prompt)[1] for prompt in prompts]))
    for b, prompt in enumerate(prompts):
        alone, _ = model(torch.cat((prompt, following[b : b + 1]), 1))
        assert torch.allclose(together[b], alone[0, -6:], atol=1e-10)


def test_the_state_of_another_model_or_batch_is_refused_by_one_sentence():
    model, ids = small_model(), torch.randint(0, V, (2, 4))
    for other, batch, words in [
        (small_model(num_layers=2), 2, r"hidden\.2 is missing, this model needs \[2, 12\]"),
        (small_model(hidden_size=8), 2, r"hidden\.0 is \[2, 8\], this model needs \[2, 12\]"),
        (model, 1, r"hidden\.0 is \[1, 12\], this model needs \[2, 12\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(ids, other.empty_state(batch))
    with pytest.raises(ValueError, match="TransformerState is the state of another model family"):
        model(ids, TransformerState(torch.zeros(2, dtype=torch.int64), []))
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids, model.empty_state(2), [[4], [4]])


def test_a_token_never_changes_earlier_logits_and_always_its_own():
    model, ids = small_model(), torch.randint(0, V, (2, 20))
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % V
        before, after = model(ids)[0], model(changed)[0]
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-12)
        assert (before[:, t] != after[:, t]).any(-1).all()


def test_permuting_the_batch_permutes_the_logits():
    model, ids, order = small_model(), torch.randint(0, V, (4, 12)), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model(ids[order])[0], model(ids)[0][order], atol=1e-12)


def test_packed_documents_equal_the_documents_alone_in_logits_and_gradients():
    model, ids, lengths = small_model(), torch.randint(0, V, (1, 20)), [6, 1, 13]
    packed, _ = model(ids, doc_lengths=[lengths])
    model.losses(ids, Documents.from_lengths([lengths], "cpu")).cross_entropy.backward()
    got = {name: grad.clone() for name, grad in gradients_of(model).items()}
    model.zero_grad()
    for part, want in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        assert torch.allclose(model(part)[0], want, atol=1e-11)
        model.losses(part, Documents.whole_rows(1, part.shape[1], "cpu")).cross_entropy.backward()
    assert_close(got, gradients_of(model), 1e-11)


def test_no_gradient_crosses_a_document_boundary():
    model, seen = small_model(), {}
    model.embedding.register_forward_hook(lambda _, __, out: seen.setdefault("x", out).retain_grad())
    logits, _ = model(torch.randint(0, V, (1, 12)), doc_lengths=[[5, 7]])
    logits[:, 5:].square().sum().backward()
    assert (seen["x"].grad[:, :5] == 0).all() and (seen["x"].grad[:, 5:] != 0).all()


def test_recompute_changes_no_gradient_bit():
    model, ids = small_model(), torch.randint(0, V, (2, 14))
    documents, found = Documents.from_lengths([[14], [6, 8]], "cpu"), []
    for mode in LiquidNetConfig.recompute_choices:
        model.zero_grad()
        model.losses(ids, documents, recompute=mode).cross_entropy.backward()
        found.append({name: grad.clone() for name, grad in gradients_of(model).items()})
    assert len(found) == 2 and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


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
    _, final = model.layers[0].liquid(torch.zeros(1, 64, 13), state=torch.ones(1, 13))
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
    assert abs(model.losses(ids, documents).cross_entropy / documents.num_labels - math.log(V)) < 0.05


def test_every_weight_has_one_global_name():
    model = small_model()
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name, part in global_index(model).values():
        covered[name][part] += 1
    assert all((count == 1).all() for count in covered.values())


def test_the_model_can_be_built_without_memory():
    with torch.device("meta"):
        model = LiquidNet(small_config())
    model.to_empty(device="cpu")
    initialize(model, seed=3)
    plain = LiquidNet(small_config())
    initialize(plain, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_few_steps_lower_the_loss_of_a_text():
    text = b"the quick brown fox jumps over the lazy dog; the lazy dog sleeps, the quick brown fox runs. " * 3
    ids = torch.tensor(list(text))[: 2 * 120].view(2, 120) - 32
    model = LiquidNet(small_config(hidden_size=32, ffn_hidden_size=64, num_layers=2, vocab_size=96))
    initialize(model, seed=0)
    optimizer, documents, losses = (
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        Documents.whole_rows(2, 120, "cpu"),
        [],
    )
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.losses(ids, documents).cross_entropy / documents.num_labels
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4.4 and losses[-1] < 2.0, losses


def test_bf16_is_near_fp32():
    model = small_model(torch.float32, hidden_size=64, ffn_hidden_size=128, init_method_std=0.15)
    ids = torch.randint(0, V, (2, 64))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    narrow = LiquidNet(model.config)
    narrow.load_state_dict(model.state_dict())
    narrow.bfloat16()
    documents, found = Documents.from_lengths([[64], [20, 44]], "cpu"), []
    for each in (narrow, model):
        losses = each.losses(ids, documents)
        losses.cross_entropy.backward()
        found.append(gradients_of(each) | {"loss": losses.cross_entropy, "logits": each(ids)[0]})
    assert narrow.empty_state(1).hidden[0].dtype == narrow(ids)[1].hidden[0].dtype == torch.float32
    assert relative_error(found[0].pop("loss"), found[1].pop("loss")) < 5e-3
    assert_close(found[0], found[1], 5e-2)


def test_a_floor_of_decay_above_the_longest_half_life_is_refused():
    with pytest.raises(ValueError, match=r"delta_min=0\.001 allows no half-life of 4096 tokens.*below 0\.000169"):
        small_config(delta_min=1e-3)
