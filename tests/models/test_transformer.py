import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.layers.documents import Documents
from lfm.models.global_names import global_index, global_views
from lfm.models.language_model import initialize
from lfm.models.liquidnet import LiquidNetState
from lfm.models.transformer import Transformer, TransformerConfig, TransformerState
from tests.comparison import assert_close, relative_error
from tests.models.reference_transformer import batch_loss, document_forward

V = 40


def small_config(**changes) -> TransformerConfig:
    tree = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 20}
    return TransformerConfig.model_validate(
        tree | {"seq_length": 32, "vocab_size": V, "vocab_size_multiple": 16} | changes
    )


def small_model(dtype=torch.float64, **changes) -> Transformer:
    """Initialised with larger weights than for training, so that every part shows in the logits."""
    model = Transformer(small_config(**{"init_method_std": 0.4} | changes))
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def gradients_of(model) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return global_views(model, lambda name, _: parameters[name].grad)


def streamed(model, ids, sizes):
    state, logits = None, []
    for part in ids.split(sizes, dim=1):
        out, state = model(part, state)
        logits.append(out)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("num_query_groups", [1, 2, 4])
def test_logits_loss_and_every_gradient_equal_the_equations(num_query_groups):
    model = small_model(num_query_groups=num_query_groups)
    ids, lengths = torch.randint(0, V, (2, 14)), [[14], [5, 1, 8]]
    w = {n: t.clone().requires_grad_() for n, t in global_views(model, lambda _, t: t).items()}
    want = torch.cat([document_forward(w, model.config, part) for part in ids[1].split(lengths[1])])
    assert relative_error(model(ids, doc_lengths=lengths)[0][1], want) < 1e-12

    losses = model.losses(ids, Documents.from_lengths(lengths, "cpu"))
    losses.cross_entropy.backward()
    want_loss = batch_loss(w, model.config, ids, lengths)
    want_loss.backward()
    assert relative_error(losses.cross_entropy, want_loss) < 1e-12
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


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_split_of_a_sequence_gives_the_same_logits(sizes):
    model = small_model().eval()
    ids = torch.randint(0, V, (2, sum(sizes)), generator=torch.Generator().manual_seed(len(sizes)))
    assert (streamed(model, ids, sizes) - model(ids)[0]).abs().max() < 1e-9


def test_prompt_then_one_token_at_a_time_in_fp32():
    model, ids = small_model(torch.float32).eval(), torch.randint(0, V, (2, 24))
    assert (streamed(model, ids, [10] + [1] * 14) - model(ids)[0]).abs().max() < 1e-4


def test_the_empty_state_is_no_state():
    model, ids = small_model().eval(), torch.randint(0, V, (2, 9))
    assert torch.allclose(model(ids, model.empty_state(2))[0], model(ids)[0], atol=1e-12)
    assert model.empty_state(2).num_bytes == 16 + 2 * 16  # int64: the position, and a padding a layer


def test_states_of_several_prefixes_continue_in_one_batch():
    model, following = small_model().eval(), torch.randint(0, V, (3, 6))
    prompts = [torch.randint(0, V, (1, n)) for n in (3, 11, 1)]
    together, _ = model(following, TransformerState.stack([model(prompt)[1] for prompt in prompts]))
    for b, prompt in enumerate(prompts):
        alone, _ = model(torch.cat((prompt, following[b : b + 1]), 1))
        assert torch.allclose(together[b], alone[0, -6:], atol=1e-10)


def test_the_state_of_another_model_or_batch_is_refused_by_one_sentence():
    model, ids = small_model(), torch.randint(0, V, (2, 4))
    for other, batch, words in [
        (small_model(num_layers=1), 2, r"caches\.1\.key is missing, this model needs \[2, 2, 4, 4\]"),
        (small_model(num_query_groups=4), 2, r"caches\.0\.key is \[2, 4, 4, 4\], this model needs \[2, 2, 4, 4\]"),
        (model, 1, r"caches\.0\.key is \[1, 2, 4, 4\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(ids, other(ids[:batch])[1])
    with pytest.raises(ValueError, match="LiquidNetState is the state of another model family"):
        model(ids, LiquidNetState([]))


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


def test_recompute_changes_no_gradient_bit():
    model, ids = small_model(), torch.randint(0, V, (2, 14))
    documents, found = Documents.from_lengths([[14], [6, 8]], "cpu"), []
    for mode in TransformerConfig.recompute_choices:
        model.zero_grad()
        model.losses(ids, documents, recompute=mode).cross_entropy.backward()
        found.append({name: grad.clone() for name, grad in gradients_of(model).items()})
    assert len(found) == 2 and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_initial_distributions():
    model = Transformer(small_config(hidden_size=128, num_layers=8, ffn_hidden_size=256))
    initialize(model, seed=0)
    for name, tensor in global_views(model, lambda _, t: t).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        else:
            want = 0.005 if name.endswith((".o.weight", "down.weight")) else 0.02
            assert abs(tensor.std() / want - 1) < 0.03 and abs(tensor.mean()) < 1e-3, name


def test_every_weight_has_one_global_name():
    model = small_model()
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name, part in global_index(model).values():
        covered[name][part] += 1
    assert all((count == 1).all() for count in covered.values())


def test_a_few_steps_lower_the_loss_of_a_text():
    text = b"the quick brown fox jumps over the lazy dog; the lazy dog sleeps, the quick brown fox runs. " * 3
    ids = torch.tensor(list(text))[: 2 * 120].view(2, 120) - 32
    model = Transformer(small_config(hidden_size=32, ffn_hidden_size=64, seq_length=120, vocab_size=96))
    initialize(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    documents, losses = Documents.whole_rows(2, 120, "cpu"), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.losses(ids, documents).cross_entropy / documents.num_labels
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - math.log(96)) < 0.1 and losses[-1] < 2.0, losses


def test_bf16_is_near_fp32():
    model = small_model(torch.float32, hidden_size=64, ffn_hidden_size=128, init_method_std=0.12)
    ids = torch.randint(0, V, (2, 32))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    narrow = Transformer(model.config)
    narrow.load_state_dict(model.state_dict())
    narrow.bfloat16()
    documents, found = Documents.from_lengths([[32], [20, 12]], "cpu"), []
    for each in (narrow, model):
        losses = each.losses(ids, documents)
        losses.cross_entropy.backward()
        found.append(gradients_of(each) | {"loss": losses.cross_entropy, "logits": each(ids)[0]})
    assert relative_error(found[0].pop("loss"), found[1].pop("loss")) < 5e-3
    assert_close(found[0], found[1], 5e-2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 3}, "hidden_size=16 over num_attention_heads=3"),
        ({"num_query_groups": 3}, "num_query_groups=3 does not divide 4 heads"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)
