"""The arithmetic of the plasticity probe, and its four conditions on a model made to show them."""

import random

import pytest
import torch

from lfm.data.tokenizer import Tokenizer
from lfm.models.generation import prefill
from lfm.models.language_model import initialize
from lfm.models.liquidnn import LiquidNNConfig, MiniLiquidGPT, reset_hidden
from lfm.training.plasticity import CONDITIONS, MEANINGS, PROBE, TEXT, Probe, compare, made_up_word, probe, target_ids


@pytest.fixture
def tokenizer(text_data):
    return Tokenizer.from_file(text_data / "tokenizer.json")


def test_each_condition_is_what_its_name_says(tokenizer):
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=16, num_fast=1, num_deep=1, vocab_size=512)).double()
    initialize(model, seed=1)
    model.eval()
    found = probe(model, tokenizer, "ZEPHYR", "sunset")
    targets = target_ids(tokenizer, "sunset")
    text = torch.tensor([tokenizer.encode(TEXT.format(word="ZEPHYR", meaning="sunset"))])
    question = torch.tensor([tokenizer.encode(PROBE.format(word="ZEPHYR"))])

    def probability(logits):
        return float(logits[0, -1].softmax(-1)[targets].mean())

    with torch.no_grad():
        model.plastic = False
        wanted = [probability(model(question)[0])]
        wanted.append(probability(model(torch.cat((text, question), 1))[0]))
        model.plastic = True
        wanted.append(probability(model(torch.cat((text, question), 1))[0]))
        _, state = model(text)
        wanted.append(probability(model(question, reset_hidden(state))[0]))
    assert found.probability == pytest.approx(wanted, rel=1e-6)
    assert model.plastic and len(set(found.probability)) == 4


def test_targets_are_first_tokens_each_once(tokenizer):
    for meaning in MEANINGS:
        ids = target_ids(tokenizer, meaning)
        assert len(ids) == len(set(ids)) and all(0 <= token < 512 for token in ids)
    assert tokenizer.encode(" sun")[0] in target_ids(tokenizer, "sunset")


def probes_of(rows):
    return [Probe(f"W{i}", "sunset", row) for i, row in enumerate(rows)]


def test_a_sure_gain_is_told_from_noise():
    generator = random.Random(0)
    noise = [tuple(generator.gauss(1.0, 0.05) for _ in CONDITIONS) for _ in range(60)]
    on_off, alone = compare(probes_of(noise), seed=0)
    assert not on_off.learnt and not alone.learnt and on_off.interval[0] < 0 < on_off.interval[1]
    better = [(a, b, b + 0.2, d) for a, b, _, d in noise]
    on_off, alone = compare(probes_of(better), seed=0)
    assert on_off.learnt and on_off.relative_gain == pytest.approx(0.2, abs=0.01) and not alone.learnt
    assert "a gain" in on_off.sentence() and "no sure gain" in alone.sentence()


def test_the_interval_holds_the_true_difference_about_95_times_in_100():
    generator, hits = random.Random(1), 0
    for _ in range(60):
        rows = [(1.0, b := generator.gauss(1, 0.3), b + generator.gauss(0.1, 0.3), 1.0) for _ in range(40)]
        low, high = compare(probes_of(rows), seed=0, resamples=400)[0].interval
        hits += low <= 0.1 <= high
    assert hits >= 50, hits


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
    monkeypatch.setattr("lfm.models.generation.PREFILL_TOKENS", 5)
    pieces, _ = prefill(model, ids)
    assert torch.allclose(whole, pieces, atol=1e-12)
