"""The arithmetic of the plasticity probe, and its four conditions on a model made to show them."""

import math
import random

import pytest
import torch

from lfm.data.tokenizer import Tokenizer
from lfm.evaluation.plasticity import (
    CONDITIONS,
    MEANINGS,
    PROBE,
    TEXT,
    Probe,
    compare,
    made_up_word,
    probe,
    probes,
    target_ids,
)
from lfm.inference.sampling import prefill
from lfm.models.initialization import initialize
from lfm.models.liquidnn import LiquidNNConfig, MiniLiquidGPT, reset_hidden


@pytest.fixture
def tokenizer(text_data):
    return Tokenizer.from_file(text_data / "tokenizer.json")


def test_each_condition_is_what_its_name_says(tokenizer):
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=16, num_fast=1, num_deep=1, vocab_size=512)).double()
    initialize(model, seed=1)
    model.eval()
    found = probe(model, tokenizer, "ZEPHYR", "sunset")
    targets = [target_ids(tokenizer, meaning) for meaning in MEANINGS]
    text = torch.tensor([tokenizer.encode(TEXT.format(word="ZEPHYR", meaning="sunset"))])
    question = torch.tensor([tokenizer.encode(PROBE.format(word="ZEPHYR"))])

    def probability(logits):
        return tuple(float(logits[0, -1].softmax(-1)[ids].mean()) for ids in targets)

    with torch.no_grad():
        wanted = [probability(model(question)[0])]
        model.plastic = False
        wanted.append(probability(model(torch.cat((text, question), 1))[0]))
        model.plastic = True
        wanted.append(probability(model(torch.cat((text, question), 1))[0]))
        _, state = model(text)
        wanted.append(probability(model(question, reset_hidden(state))[0]))
    for got, want in zip(found.probability, wanted, strict=True):
        assert got == pytest.approx(want, rel=1e-9)
    assert model.plastic and len(set(found.probability)) == 4


@pytest.mark.parametrize("seed", range(4))
def test_plasticity_that_was_never_trained_is_no_gain(tokenizer, seed):
    """The traces are large and random: they move the probability of every word, and know no meaning."""
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=32, num_fast=1, num_deep=1, deep_steps=2, vocab_size=512))
    initialize(model, seed=seed)
    model.eval()
    model.embedding.weight.data *= 25  # a fresh model's logits are almost equal
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        if name.endswith("log_eta"):
            parameter.data.zero_()
    found = probes(model, tokenizer, num_words=len(MEANINGS), seed=0)
    assert not any(comparison.learnt for comparison in compare(found, seed=0))
    moved = [p.probability[2][0] / p.probability[1][0] for p in found]
    assert max(abs(ratio - 1) for ratio in moved) > 0.01, "plasticity does something"


def test_targets_are_first_tokens_each_once(tokenizer):
    for meaning in MEANINGS:
        ids = target_ids(tokenizer, meaning)
        assert len(ids) == len(set(ids)) and all(0 <= token < 512 for token in ids)
    assert tokenizer.encode(" sun")[0] in target_ids(tokenizer, "sunset")


def probes_of(preferences):
    """Probes whose preferences are these, word by word and condition by condition, meanings in turn."""

    def row(own, meaning):
        return tuple(math.exp(own) if other == meaning else 1.0 for other in MEANINGS)

    meanings = [list(MEANINGS)[i % len(MEANINGS)] for i in range(len(preferences))]
    return [
        Probe(f"W{i}", meaning, tuple(row(own, meaning) for own in owns))
        for i, (meaning, owns) in enumerate(zip(meanings, preferences, strict=True))
    ]


def test_a_preference_is_of_the_own_meaning_over_the_others():
    probability = tuple((0.2 if other == "king" else 0.1) for other in MEANINGS)
    assert Probe("W", "king", (probability,)).preference(0) == pytest.approx(math.log(2))
    assert Probe("W", "king", ((0.3,) * 8,)).preference(0) == 0


def test_a_sure_gain_is_told_from_noise():
    generator = random.Random(0)
    noise = [tuple(generator.gauss(1.0, 0.05) for _ in CONDITIONS) for _ in range(64)]
    on_off, alone = compare(probes_of(noise), seed=0)
    assert not on_off.learnt and not alone.learnt and on_off.interval[0] < 0 < on_off.interval[1]
    better = [(a, b, b + 0.2, d) for a, b, _, d in noise]
    on_off, alone = compare(probes_of(better), seed=0)
    assert on_off.learnt and on_off.relative_gain == pytest.approx(math.expm1(0.2), abs=0.01) and not alone.learnt
    assert "a gain" in on_off.sentence() and "no sure gain" in alone.sentence()


def test_many_words_of_one_meaning_are_one_observation():
    """One of the eight gains much, and a hundred words of it are no surer of what the others would."""
    rows = [(1.0, 1.0, 1.0 + (i % 8 == 0), 1.0) for i in range(800)]
    comparison = compare(probes_of(rows), seed=0)[0]
    assert comparison.relative_gain > 0.05 and comparison.interval[0] == 0 and not comparison.learnt


def test_the_interval_is_rarely_beside_the_true_difference():
    generator, hits = random.Random(1), 0
    for _ in range(60):
        effects = [generator.gauss(0.1, 0.3) for _ in MEANINGS]
        rows = [(1.0, b := generator.gauss(1, 0.3), b + effects[i % 8], 1.0) for i in range(40)]
        low, high = compare(probes_of(rows), seed=0, resamples=1000)[0].interval
        hits += low <= 0.1 <= high
    assert hits >= 54, hits


def test_made_up_words_differ_and_do_not_change():
    words = [made_up_word(random.Random(3)) for _ in range(2)]
    generator = random.Random(3)
    many = [made_up_word(generator) for _ in range(200)]
    assert words[0] == words[1] == many[0] and len(set(many)) > 190 and all(word.isupper() for word in many)


def test_prefill_in_pieces_is_one_reading(tokenizer, monkeypatch):
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=16, num_fast=1, num_deep=1, vocab_size=512)).double()
    initialize(model, seed=1)
    model.eval()
    ids = tokenizer.encode("def f(self): return self.value\n")
    whole, _ = prefill(model, ids)
    monkeypatch.setattr("lfm.inference.sampling.PREFILL_TOKENS", 5)
    pieces, _ = prefill(model, ids)
    assert torch.allclose(whole, pieces, atol=1e-12)
