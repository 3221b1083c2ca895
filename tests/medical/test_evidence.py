"""Evidence: scores are exact derivatives, spans hold their tokens, and faithfulness is what deletion does."""

import numpy as np
import pytest
import torch

from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.layers.diagonal_liquid import DiagonalLiquid
from lfm.layers.liquid import Liquid
from lfm.medical.evidence import evidence, spans_of, token_scores
from lfm.models.initialization import initialize
from lfm.models.registry import build, parse
from tests.export.checkpoints import SIZES, TREES, VARIANTS

KINDS = {"lfm": TREES["lfm"], "liquidnet": TREES["liquidnet"], "diagonal": VARIANTS["lfm_diagonal_swiglu"]}


def model_of(tree):
    model = build(parse(SIZES | tree, source="a test")).double()
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # none is left at zero
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(
        ["the pulse of the heart is slow and the valve leaks. bone and joint hurt. " * 20], 300, allow_smaller=True
    )


def scaled(model, token, by):
    """Hooks that multiply what drives the recurrences at one position."""

    def change(module, args, output):
        output = output.clone()
        width = output.shape[-1] if module not in fused else fused[module]
        output[:, token, :width] *= by
        return output

    liquids = [module for module in model.modules() if isinstance(module, (Liquid, DiagonalLiquid))]
    fused = {module.projections: module.width for module in liquids if isinstance(module, DiagonalLiquid)}
    return [
        (module.input if isinstance(module, Liquid) else module.projections).register_forward_hook(change)
        for module in liquids
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_derivative_by_the_size_of_a_token_s_drive(kind):
    """Central differences of the answer's log-probability in float64, through every recurrent layer at once."""
    model = model_of(KINDS[kind])
    prompt, answer = [5, 9, 40, 3, 77, 12], [8, 30]
    found = token_scores(model, prompt, answer)["drive"]

    def score(token, by):
        hooks = scaled(model, token, by)
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + answer]))
        for hook in hooks:
            hook.remove()
        logs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(logs.gather(1, torch.tensor(answer)[:, None]).sum())

    step = 1e-4
    wanted = [(score(t, 1 + step) - score(t, 1 - step)) / (2 * step) for t in range(len(prompt))]
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-7), (found, wanted)
    assert np.abs(found).max() > 1e-6


def test_attention_weights_of_a_row_sum_to_one():
    prompt, answer = [5, 9, 40, 3], [8]
    found = token_scores(model_of(KINDS["lfm"]), prompt, answer)["attention"]
    assert found.sum() == pytest.approx(1) and (found > 0).all()


def test_spans_are_sentences_or_the_words_of_one_and_never_the_line_that_asks():
    found = spans_of("The heart is slow. A valve leaks! Why?\nChapter:")
    assert [span.text.strip() for span in found] == ["The heart is slow.", "A valve leaks!", "Why?"]
    text = "a slow heart\nAnswer:"
    assert [(text[s.start : s.end], s.text) for s in spans_of(text)] == [
        ("a ", "a "),
        ("slow ", "slow "),
        ("heart", "heart"),
    ]
    assert len(spans_of("heart")) == 1


def test_evidence_has_its_faithfulness_by_every_way_to_choose(tokenizer):
    model = model_of(KINDS["lfm"])
    asked = [("the pulse is slow. the valve leaks. bone hurts.\nChapter:", " heart"), ("heart\nChapter:", " bone")]
    (found,) = evidence(model, tokenizer, asked)  # the second has one span
    assert set(found.faithfulness) == {"drive", "embedding", "attention", "random"} == set(found.scores)
    assert all(np.isfinite(numbers).all() for numbers in found.faithfulness.values())
    assert [score for score, _ in found.ranked()] == sorted(found.scores["drive"], reverse=True)

    def p(text):
        ids, answer = tokenizer.encode(text), tokenizer.encode(" heart")
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids + answer]))
        logs = logits[0, len(ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        return float(logs.mean().exp())

    order = np.argsort(-found.scores["drive"])
    sentences = ["the pulse is slow. ", "the valve leaks. ", "bone hurts."]
    more, less = [], []
    for count in (1, 1, 2):  # a tenth, a fifth and half of three spans
        top = set(order[:count])
        kept = {
            side: "".join(s for i, s in enumerate(sentences) if (i in top) == side).rstrip() for side in (True, False)
        }
        more.append(p(asked[0][0]) - p(kept[False] + "\nChapter:"))
        less.append(p(asked[0][0]) - p(kept[True] + "\nChapter:"))
    assert found.faithfulness["drive"] == pytest.approx((np.mean(more), np.mean(less)), abs=1e-6)


def test_a_family_without_driven_recurrences_is_refused(tokenizer):
    with pytest.raises(UserError, match="this model of kind transformer has none"):
        evidence(model_of(TREES["transformer"]), tokenizer, [("a slow heart\nAnswer:", " bone")])
