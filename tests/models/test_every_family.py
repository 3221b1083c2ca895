"""What lfm/models/language_model.py promises of every family, on small models of each in float64.

A family's own file has its small model, its equations and whatever no other family has.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm.errors import UserError
from lfm.inference.sampling import SamplingConfig, generate
from lfm.kernels.liquid_cell.running_trace import FACTORS
from lfm.layers.documents import Documents, Rows
from lfm.models import registry
from lfm.models.global_names import global_views, moving_names, stored
from lfm.models.initialization import initialize
from lfm.models.language_model import LanguageModel
from lfm.models.registry import FAMILIES as FAMILY_CLASSES
from lfm.objectives.next_token import NEXT_TOKEN
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models import test_laerc, test_lfm, test_liquidlm, test_liquidnet, test_liquidnn, test_lstm, test_transformer
from tests.nested import nested

Changes = dict[str, Any]
DEFAULT: dict[str, Changes] = {"default": {}}


@dataclass(frozen=True, kw_only=True)
class Family:
    small_model: Callable[..., LanguageModel]
    """Of a dtype, with changes to its configuration; its dropout is off in evaluation."""
    variants: dict[str, Changes] = field(default_factory=lambda: DEFAULT)
    packed: dict[str, Changes] = field(default_factory=dict)
    """More, for packed documents and parts of a sequence: too slow for every test."""
    streamed: dict[str, Changes] = field(default_factory=dict)
    """More, for parts of a sequence: the rows of some see each other."""
    matrices: tuple[str, str]
    """Two randomly drawn ones of one shape."""
    shallower: Changes = field(default_factory=lambda: {"num_layers": 1})
    """A smaller model with the first of `matrices`, drawn from the same distribution."""
    refused: list[tuple[Changes, int, str]]
    """Changes and batch of states that a batch of 2 does not take, and why."""
    untruncated: Changes = field(default_factory=dict)
    """What makes its gradients those of whole documents."""
    prompt: int = 10
    """Tokens read at once, and then `singles` one by one."""
    singles: int = 50
    longest_part: int = 9
    """Of a sequence that is read in parts."""
    same_bits: bool = True
    """Whether a position's logits keep their bits when only later tokens change."""

    def model(self, variant: str = "default", dtype: torch.dtype = torch.float64, **changes: Any) -> LanguageModel:
        found = self.variants | self.packed | self.streamed
        return self.small_model(dtype, **found[variant] | changes).eval()


FAMILIES = {
    "lfm": Family(
        small_model=test_lfm.small_model,
        variants=test_lfm.VARIANTS,
        matrices=("layers.0.attention.q.weight", "layers.1.attention.q.weight"),
        refused=[
            ({"num_layers": 2}, 2, r"caches\.2\.key is missing, this model needs \[2, 2, 4, 4\]"),
            ({"liquid": {"reservoir_size": 6}}, 2, r"liquid\.0 is \[2, 2, 6\], this model needs \[2, 2, 8\]"),
            ({}, 1, r"caches\.0\.key is \[1, 2, 4, 4\], this model needs \[2, 2, 4, 4\]"),
        ],
        singles=14,
        same_bits=False,
    ),
    "laerc": Family(
        small_model=test_laerc.small_model,
        variants=test_laerc.VARIANTS,
        matrices=("layers.0.reservoir.recurrent_weight", "layers.1.reservoir.recurrent_weight"),
        refused=[
            ({"reservoir_multiple": 2.0}, 2, r"reservoirs\.0 is \[2, 20\], this model needs \[2, 15\]"),
            ({"num_layers": 2}, 2, r"reservoirs\.2 is missing, this model needs \[2, 15\]"),
            ({}, 3, r"reservoirs\.0 is \[3, 15\], this model needs \[2, 15\]"),
        ],
    ),
    "liquidlm": Family(
        small_model=test_liquidlm.small_model,
        variants=test_liquidlm.VARIANTS,
        matrices=("lstm.weight_hh_l0", "lstm.weight_hh_l1"),
        refused=[
            ({"num_layers": 1}, 2, r"c is \[2, 1, 12\], this model needs \[2, 3, 12\]"),
            ({}, 3, r"c is \[3, 3, 12\], this model needs \[2, 3, 12\]"),
        ],
    ),
    "liquidnn": Family(
        small_model=test_liquidnn.small_model,
        variants={name: test_liquidnn.VARIANTS[name] for name in ("default", "published", "adaptive")},
        packed=test_liquidnn.VARIANTS,
        streamed=test_liquidnn.STREAMED,
        matrices=("cells.1.ih.weight", "cells.1.hh.weight"),
        shallower={"num_deep": 1},
        refused=[
            ({"hidden_size": 10}, 2, r"hidden\.0 is \[2, 10\], this model needs \[2, 8\]"),
            ({}, 3, r"hidden\.0 is \[3, 8\], this model needs \[2, 8\]"),
        ],
        untruncated={"bptt_window": 64},
        prompt=FACTORS + 4,
        singles=36 - FACTORS,
    ),
    "liquidnet": Family(
        small_model=test_liquidnet.small_model,
        matrices=("layers.0.liquid.value.weight", "layers.1.liquid.value.weight"),
        refused=[
            ({"num_layers": 2}, 2, r"hidden\.2 is missing, this model needs \[2, 12\]"),
            ({"hidden_size": 8}, 2, r"hidden\.0 is \[2, 8\], this model needs \[2, 12\]"),
            ({}, 1, r"hidden\.0 is \[1, 12\], this model needs \[2, 12\]"),
        ],
        longest_part=30,
    ),
    "transformer": Family(
        small_model=test_transformer.small_model,
        matrices=("layers.0.attention.q.weight", "layers.1.attention.q.weight"),
        refused=[
            ({"num_layers": 1}, 2, r"caches\.1\.key is missing, this model needs \[2, 2, 4, 4\]"),
            ({"num_query_groups": 4}, 2, r"caches\.0\.key is \[2, 4, 4, 4\], this model needs \[2, 2, 4, 4\]"),
            ({}, 1, r"caches\.0\.key is \[1, 2, 4, 4\], this model needs \[2, 2, 4, 4\]"),
        ],
    ),
    "lstm": Family(
        small_model=test_lstm.small_model,
        matrices=("lstm.weight_hh_l0", "lstm.weight_hh_l1"),
        refused=[({}, 1, r"c is \[1, 3, 12\], this model needs \[2, 3, 12\]")],
    ),
}


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def cases(variants: Callable[[Family], dict[str, Changes]]) -> pytest.MarkDecorator:
    found = [pytest.param(f, name, id=f"{kind}-{name}") for kind, f in FAMILIES.items() for name in variants(f)]
    return pytest.mark.parametrize("family, variant", found)


every_variant = cases(lambda family: family.variants)


def random_ids(model: LanguageModel, batch: int, length: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


def streamed(model: LanguageModel, ids: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    state, logits = None, []
    for part in ids.split(sizes, dim=1):
        out, state = model(part, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def cross_entropy_of(model: LanguageModel, ids: Tensor, lengths: list[list[int]]) -> Tensor:
    return cross_entropy(model, ids, Documents.from_lengths(lengths, "cpu"))


def gradients_of(model: LanguageModel) -> dict[str, Tensor]:
    """Copies; zero for none, and where there is nothing but rounding (a router that chooses a single expert)."""
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return {name: grad * (grad.norm() > 1e-14) for name, grad in found.items()}


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def test_no_family_is_left_out():
    assert {type(family.model().config) for family in FAMILIES.values()} == set(registry.FAMILIES)


@every_variant
@torch.no_grad()
def test_a_token_never_changes_earlier_logits_and_always_its_own(family, variant):
    model = family.model(variant)
    ids = random_ids(model, 2, 20)
    before = model(ids)[0]
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % model.config.vocab_size
        after = model(changed)[0]
        if t:
            assert largest_difference(before[:, :t], after[:, :t]) <= (0 if family.same_bits else 1e-12)
        assert (before[:, t] != after[:, t]).any(-1).all()


@every_family
@settings(deadline=None, max_examples=20)
@given(data=st.data())
@torch.no_grad()
def test_any_split_of_a_sequence_gives_the_same_logits_and_state(family, data):
    sizes = data.draw(st.lists(st.integers(1, family.longest_part), min_size=1, max_size=6))
    model = family.model(data.draw(st.sampled_from(sorted(family.variants | family.packed | family.streamed))))
    ids = random_ids(model, 2, sum(sizes), seed=len(sizes))
    (logits, state), (want, want_state) = streamed(model, ids, sizes), model(ids)
    assert largest_difference(logits, want) < 1e-9
    if want_state.tensors():
        assert_close(state.tensors(), want_state.tensors(), 1e-9)


@torch.no_grad()
def error_of_streaming(family: Family, variant: str, dtype: torch.dtype) -> float:
    """Of a prompt, then one token at a time."""
    model = family.model(variant, dtype)
    ids = random_ids(model, 2, family.prompt + family.singles)
    logits, _ = streamed(model, ids, [family.prompt] + [1] * family.singles)
    return largest_difference(logits, model(ids)[0])


@every_family
def test_prompt_then_one_token_at_a_time(family):
    assert error_of_streaming(family, "default", torch.float64) < 1e-9


@every_variant
def test_prompt_then_one_token_at_a_time_in_fp32(family, variant):
    assert error_of_streaming(family, variant, torch.float32) < 1e-4


@every_family
@torch.no_grad()
def test_the_empty_state_is_no_state(family):
    model = family.model()
    ids, empty = random_ids(model, 2, 9), model.empty_state(2)
    if empty is None:
        pytest.skip("its empty state cannot be written down")
    assert torch.equal(model(ids, empty)[0], model(ids)[0])


@every_family
@torch.no_grad()
def test_a_state_can_be_continued_twice(family):
    model = family.model()
    ids = random_ids(model, 2, 9)
    _, state = model(ids)
    first, _ = model(ids[:, :3], state)
    model(ids[:, 3:], state)
    assert torch.equal(model(ids[:, :3], state)[0], first)


@pytest.mark.parametrize("sizes", [[6], [1] * 6], ids=["at_once", "one_by_one"])
@every_family
@torch.no_grad()
def test_states_of_several_prefixes_continue_in_one_batch(family, sizes):
    model = family.model()
    prompts, following = [random_ids(model, 1, n, seed=n) for n in (3, 17, 11, 1)], random_ids(model, 4, 6)
    states = [model(prompt)[1] for prompt in prompts]
    state, start = type(states[0]).stack(states), 0
    for part in following.split(sizes, dim=1):
        logits, state = model(part, state)
        for b, prompt in enumerate(prompts):
            alone, _ = model(torch.cat((prompt, following[b : b + 1, : start + part.shape[1]]), 1))
            assert largest_difference(logits[b], alone[0, -part.shape[1] :]) < 1e-12
        start += part.shape[1]
    if hasattr(state, "position"):
        assert state.position.tolist() == [9, 23, 17, 7]


@every_family
@torch.no_grad()
def test_the_states_of_single_rows_stack_to_that_of_the_batch(family):
    model = family.model()
    ids = random_ids(model, 2, 6)
    states = [model(row[None])[1] for row in ids]
    assert_close(type(states[0]).stack(states).tensors(), model(ids)[1].tensors(), 1e-12)


@pytest.mark.parametrize(
    "family, changes, batch, words",
    [
        pytest.param(f, *refused, id=f"{name}-{i}")
        for name, f in FAMILIES.items()
        for i, refused in enumerate(f.refused)
    ],
)
@torch.no_grad()
def test_the_state_of_another_model_or_batch_is_refused_by_one_sentence(family, changes, batch, words):
    other = family.model(**changes)
    _, state = other(random_ids(other, batch, 4))
    model = family.model()
    with pytest.raises(ValueError, match="is of another model or batch: " + words) as error:
        model(random_ids(model, 2, 4), state)
    assert "\n" not in str(error.value)


@every_family
@torch.no_grad()
def test_the_state_of_another_family_is_refused_by_one_sentence(family):
    model = family.model()
    ids, own = random_ids(model, 2, 4), type(model(random_ids(model, 1, 1))[1])
    for other in (each.model() for each in FAMILIES.values() if each is not family):
        _, state = other(random_ids(other, 2, 4))
        words = f"{type(state).__name__} is the state of another model family, not {own.__name__}"
        with pytest.raises(ValueError, match=words) as error:
            model(ids, state)
        assert "\n" not in str(error.value)


@every_family
@torch.no_grad()
def test_documents_beside_a_state_are_refused(family):
    model = family.model()
    ids = random_ids(model, 2, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids, model(ids)[1], doc_lengths=[[4], [4]])


@every_variant
@torch.no_grad()
def test_rows_do_not_see_each_other(family, variant):
    model = family.model(variant)
    ids, lengths, order = random_ids(model, 4, 12), [[12], [5, 7], [1, 1, 10], [12]], torch.tensor([2, 0, 3, 1])
    logits, state = model(ids, doc_lengths=lengths)
    again, state_again = model(ids[order], doc_lengths=[lengths[b] for b in order])
    assert largest_difference(again, logits[order]) < 1e-12
    if state.tensors():
        assert_close(state_again.tensors(), state.map(lambda x: x[order]).tensors(), 1e-12)
    alone = [model(ids[b : b + 1], doc_lengths=[lengths[b]])[0] for b in range(4)]
    assert largest_difference(torch.cat(alone), logits) < 1e-12


@cases(lambda family: family.variants | family.packed)
def test_packed_documents_equal_the_documents_alone(family, variant):
    """In logits, gradients and the state after the last one."""
    model = family.model(variant, **family.untruncated)
    ids, lengths = random_ids(model, 2, 16), [[6, 1, 9], [11, 5]]
    packed, state = model(ids, doc_lengths=lengths)
    cross_entropy_of(model, ids, lengths).backward()
    got = gradients_of(model)
    model.zero_grad()
    for b, row in enumerate(lengths):
        for document, logits in zip(ids[b : b + 1].split(row, 1), packed[b].split(row), strict=True):
            alone, last = model(document)
            assert largest_difference(alone[0], logits) < 1e-12
            if document.shape[1] > 1:
                cross_entropy_of(model, document, [[document.shape[1]]]).backward()
        if model.config.context_limit is None and last.tensors():  # a cache keeps the documents before the last one
            assert_close(state.map(lambda x, b=b: x[b : b + 1]).tensors(), last.tensors(), 1e-12)
    assert_close(got, gradients_of(model), 1e-11)


@every_variant
def test_nothing_crosses_a_document_boundary(family, variant):
    model, seen = family.model(variant), {}
    ids, lengths = random_ids(model, 1, 12), [[4, 1, 7]]
    changed = ids.clone()
    changed[:, :5] = (ids[:, :5] + 1) % model.config.vocab_size
    model.embedding.register_forward_hook(lambda _, __, out: seen.setdefault("x", out).retain_grad())
    logits = model(ids, doc_lengths=lengths)[0][:, 5:]
    logits.square().sum().backward()
    assert (seen["x"].grad[:, :5] == 0).all() and (seen["x"].grad[:, 5:] != 0).all()
    with torch.no_grad():
        again = model(changed, doc_lengths=lengths)[0][:, 5:]
    assert largest_difference(again, logits) <= (0 if family.same_bits else 1e-12)


@every_variant
@torch.no_grad()
def test_the_loss_parts_sum_to_the_cross_entropy_of_the_logits(family, variant):
    model = family.model(variant)
    ids, documents = random_ids(model, 2, 12), Documents.from_lengths([[12], [4, 1, 7]], "cpu")
    logits, labels = model(ids, doc_lengths=documents.lengths)[0], documents.labels(ids)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    parts = [part.sums["cross_entropy"] for part in model.loss_parts(Rows(ids, documents), NEXT_TOKEN)]
    assert relative_error(torch.stack(parts).sum(), want) < 1e-12
    assert relative_error(cross_entropy(model, ids, documents), want) < 1e-12


@pytest.mark.parametrize(
    "family, recompute",
    [
        pytest.param(f, mode, id=f"{name}-{mode}")
        for name, f in FAMILIES.items()
        for mode in f.small_model().config.recompute_choices
        if mode != "none"
    ],
)
def test_recompute_changes_no_bit_of_losses_gradients_and_measurements(family, recompute):
    model = family.model()
    ids, documents = random_ids(model, 2, 14), Documents.from_lengths([[14], [6, 8]], "cpu")
    found = []
    for mode in ("none", recompute):
        model.zero_grad()
        losses = model.losses(Rows(ids, documents), NEXT_TOKEN, recompute=mode)
        sum(losses.sums.values()).backward()
        measured = {f"{name} {layer}": x for name, of in losses.measure().items() for layer, x in of.items()}
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append({**losses.sums, **measured, **gradients})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "family, as_changes",
    [(FAMILIES["lfm"], lambda reservoir: {"liquid": reservoir}), (FAMILIES["laerc"], lambda reservoir: reservoir)],
    ids=["lfm", "laerc"],
)
def test_chunked_and_sequential_reservoirs_train_alike(family, as_changes):
    found = []
    for reservoir in ({"backend": "sequential"}, {"backend": "chunked", "chunk_length": 8, "warmup": 384}):
        model = family.model(**as_changes(reservoir))
        documents = Documents.from_lengths([[64], [20, 44]], "cpu")
        losses = model.losses(Rows(random_ids(model, 2, 64), documents), NEXT_TOKEN)
        losses.sums["cross_entropy"].backward()
        measured = {name: by_layer for name, by_layer in losses.measure().items() if by_layer}
        assert measured.get("reservoir_gain", {}).keys() == model.liquids.keys() == set(model.config.reservoir_layers)
        assert measured.keys() == {measure.name for measure in model.config.measured}
        found.append(gradients_of(model) | {"loss": losses.sums["cross_entropy"]})
    assert_close(found[1], found[0], 1e-9)
    assert all(value > 0 for value in measured["reservoir_saturation"].values())


@every_variant
def test_every_weight_has_one_global_name(family, variant):
    model = family.model(variant)
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for where in stored(model).values():
        if where.tensor in covered:
            covered[where.tensor][where.index] += 1
    assert all((count == 1).all() for count in covered.values())


@every_variant
def test_parameter_counts_equal_the_built_model(family, variant):
    with torch.device("meta"):
        model = registry.build(family.model(variant).config)
    counts = model.config.count_parameters()
    assert sum(p.numel() for p in model.parameters()) == counts.trainable + counts.padding
    assert counts.total == counts.trainable + counts.frozen


@every_variant
def test_a_model_built_without_memory_is_filled_whole(family, variant):
    config = family.model(variant).config
    with torch.device("meta"):
        model = registry.build(config)
    model.to_empty(device="cpu")
    initialize(model, seed=5)
    plain = registry.build(config)
    initialize(plain, seed=5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


@every_family
def test_initial_values_depend_on_seed_and_global_name_alone(family):
    model, shallower = family.model(), family.model(**family.shallower)
    name, other = family.matrices
    shape = global_views(model, lambda _, tensor: tensor)[name].shape
    assert global_views(model, lambda _, tensor: tensor)[other].shape == shape
    drawn = model.initial_tensor(name, shape, seed=1)
    assert torch.equal(drawn, shallower.initial_tensor(name, shape, seed=1))
    assert not torch.equal(drawn, model.initial_tensor(other, shape, seed=1))
    assert not torch.equal(drawn, model.initial_tensor(name, shape, seed=2))


@every_family
def test_a_model_built_from_its_configuration_alone_is_initialised(family):
    config = family.model().config
    model = FAMILY_CLASSES[type(config)](config)
    # What moves begins where its layer says, not with a draw.
    moving = moving_names(model)
    views = global_views(model, lambda name, tensor: None if name in moving else tensor)
    assert views
    for name, tensor in views.items():
        assert torch.equal(tensor, model.initial_tensor(name, tensor.shape, 0).to(tensor)), name
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in FAMILY_CLASSES[type(config)](config).state_dict().values())


@every_family
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_whole_prefix(family):
    model = family.model()
    prompts = [[3, 7, 1], [5]]
    texts = [list(prompt) for prompt in prompts]
    for tokens in generate(model, prompts, SamplingConfig(max_new_tokens=8, greedy=True), end_of_document=None):
        for text, token in zip(texts, tokens, strict=True):
            assert token == int(model(torch.tensor([text]))[0][0, -1].argmax())
            text.append(token)
    assert [len(text) for text in texts] == [11, 9]


@every_family
def test_sampling_repeats_with_its_seed_and_ignores_the_rest_of_the_batch(family):
    model = family.model()

    def run(prompts: list[list[int]], seed: int) -> list[tuple[int | None, ...]]:
        sampling = SamplingConfig(max_new_tokens=12, seed=seed)
        return list(zip(*generate(model, prompts, sampling, end_of_document=None), strict=True))

    assert run([[1, 2]], 0) == run([[1, 2]], 0) != run([[1, 2]], 1)
    assert run([[1, 2]], 0)[0] == run([[1, 2], [5, 6, 7]], 0)[0]


@every_family
def test_ended_rows_stop_and_a_context_is_never_exceeded(family):
    model = family.model(seq_length=16)
    limited, greedy = model.config.context_limit is not None, SamplingConfig(max_new_tokens=18, greedy=True)
    first = [tokens[0] for tokens in generate(model, [[4, 5]], greedy, end_of_document=None)]
    assert len(first) == (14 if limited else 18)
    ended = list(generate(model, [[4, 5], [9]], greedy, end_of_document=first[0]))
    assert ended[0][0] == first[0] and all(tokens[0] is None for tokens in ended[1:])
    with pytest.raises(UserError, match="empty"):
        next(generate(model, [[]], greedy, end_of_document=None))
    if limited:
        with pytest.raises(UserError, match=r"16 tokens and the context is 16"):
            next(generate(model, [[1] * 16], greedy, end_of_document=None))


PROSE = (json.dumps.__doc__ or "").encode()[:512]
REPETITIONS = b"the quick brown fox jumps over the lazy dog; the lazy dog sleeps, the quick brown fox runs. " * 3
LEARNERS = {
    "liquidlm": (
        {"hidden_size": 48, "num_layers": 1, "reservoir_size": 96, "hidden_dropout": 0.1},
        *(2e-2, 60, PROSE, (8, 64)),
    ),
    "liquidnet": ({"hidden_size": 32, "num_layers": 2, "ffn_hidden_size": 64}, 1e-2, 30, REPETITIONS, (2, 120)),
    "transformer": (
        {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64},
        *(3e-3, 60, REPETITIONS, (2, 120)),
    ),
    "lstm": ({"hidden_size": 48, "num_layers": 1}, 1e-2, 60, PROSE, (8, 64)),
}
"""Dimensions, learning rate, updates, text and its rows.

laerc and liquidnn learn in their own files: beside what is frozen, and in two phases.
"""


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_few_updates_bring_text_below_its_unigram_entropy(kind):
    dimensions, lr, updates, text, rows = LEARNERS[kind]
    ids = torch.tensor(list(text))[: rows[0] * rows[1]].view(rows)
    share = torch.bincount(ids.flatten()).double() / ids.numel()
    entropy = float(-(share * share.clamp_min(1e-9).log()).sum())
    model = registry.build(registry.parse({"kind": kind, "vocab_size": 128} | nested(**dimensions), source="LEARNERS"))
    initialize(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    documents, losses = Documents.whole_rows(*rows, "cpu"), []
    for _ in range(updates):
        loss = cross_entropy(model, ids, documents) / documents.num_labels
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 4.5 and losses[-1] < (2.0 if text is REPETITIONS else entropy - 0.2), losses
    if kind == "transformer":
        assert abs(losses[0] - math.log(128)) < 0.4


@pytest.mark.parametrize(
    "kind, changes, length, bound",
    [
        ("liquidlm", {"hidden_size": 64, "reservoir_size": 256, "connectivity": 0.1}, 32, 2e-2),
        ("liquidnn", {"hidden_size": 64, "num_fast": 2, "bptt_window": 64}, 24, 1e-2),
        ("liquidnet", {"hidden_size": 64, "ffn_hidden_size": 128, "init_method_std": 0.15}, 64, 5e-2),
        ("transformer", {"hidden_size": 64, "ffn_hidden_size": 128, "init_method_std": 0.12}, 64, 5e-2),
        ("lstm", {}, 32, 2e-2),
    ],
    ids=["liquidlm", "liquidnn", "liquidnet", "transformer", "lstm"],
)
def test_bf16_weights_are_near_the_same_weights_in_float64(kind, changes, length, bound):
    """Not of lfm, whose near-ties route differently, nor of laerc, whose scales are further off: see their files."""
    exact = FAMILIES[kind].model(**changes)
    narrow = registry.build(exact.config).eval()
    narrow.load_state_dict(exact.state_dict())
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    exact.load_state_dict(narrow.state_dict())
    found = []
    for model in (narrow, exact):
        ids, lengths = random_ids(model, 2, length), [[length], [20, length - 20]]
        loss = cross_entropy_of(model, ids, lengths)
        loss.backward()
        logits, state = model(ids, doc_lengths=lengths)
        # The gradient of a single rate or scale is a long sum of both signs: nothing to measure precision by.
        vectors = {name: grad for name, grad in gradients_of(model).items() if grad.numel() > 1}
        found.append((loss, logits, global_views(model, lambda name, _, vectors=vectors: vectors.get(name))))
        if model is narrow and model.config.context_limit is None:
            assert {t.dtype for t in state.tensors().values() if t.is_floating_point()} == {torch.float32}
    (loss, logits, gradients), (want_loss, want_logits, want) = found
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, want_logits) < bound
    assert relative_error(loss, want_loss) < 5e-3
    assert_close(gradients, want, 5e-2)
