"""Scores of tokens, in every family: a batch is rows by themselves, a continuation is the end of a row."""

import pytest
import torch

from lfm.evaluation.scoring import read_rows, score_continuations, score_rows
from lfm.inference import sampling
from tests.models.test_every_family import FAMILIES

TOLERANCE = 1e-6
"""Nats of a token: logits are fp32, of models in float64."""


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param].model()


def rows_of(model, lengths):
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(model.config.vocab_size, (length,), generator=draws).tolist() for length in lengths]


def alone(model, row):
    """By the definition: log-softmax of the whole row's logits."""
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0][0].float().log_softmax(-1)
    wanted = torch.tensor(row[1:])
    return -logits[:-1].gather(-1, wanted[:, None])[:, 0].double(), logits[:-1].argmax(-1) == wanted


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_of_unequal_lengths_in_a_batch_score_as_alone(model, batch_size):
    rows = rows_of(model, [7, 2, 12, 7, 1, 9])
    found = score_rows(model, rows, batch_size=batch_size)
    for row, scores in zip(rows, found, strict=True):
        nats, is_greedy = alone(model, row)
        torch.testing.assert_close(scores.nats, nats, rtol=0, atol=TOLERANCE)
        assert torch.equal(scores.is_greedy, is_greedy)


def test_only_the_tokens_asked_for_are_scored(model):
    rows = rows_of(model, [9, 6, 4])
    found = score_rows(model, rows, first=[4, 1, 3], batch_size=2)
    for row, first, scores in zip(rows, [4, 1, 3], found, strict=True):
        torch.testing.assert_close(scores.nats, alone(model, row)[0][first - 1 :], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_continuations_of_shared_and_unequal_prefixes_score_as_ends_of_rows(model, batch_size):
    short, long, other = rows_of(model, [3, 8, 5])
    ends = rows_of(model, [1, 4, 2, 3])
    pairs = [(short, ends[0]), (long, ends[1]), (short, ends[2]), (other, ends[3]), (long, ends[0]), (short, ends[1])]
    for (prefix, end), scores in zip(pairs, score_continuations(model, pairs, batch_size=batch_size), strict=True):
        nats, is_greedy = alone(model, [*prefix, *end])
        torch.testing.assert_close(scores.nats, nats[-len(end) :], rtol=0, atol=TOLERANCE)
        assert torch.equal(scores.is_greedy, is_greedy[-len(end) :])


def test_no_filling_is_read_and_a_shared_prefix_once(model, monkeypatch):
    read = []
    advance = model.advance

    def counted(ids, state=None, documents=None):
        read.append(ids.numel())
        return advance(ids, state, documents)

    monkeypatch.setattr(model, "advance", counted)
    list(read_rows(model, rows_of(model, [7, 2, 12, 7])))
    assert sum(read) == 7 + 2 + 12 + 7
    read.clear()
    prefix, *ends = rows_of(model, [10, 3, 3, 5])
    score_continuations(model, [(prefix, end) for end in ends], batch_size=8)
    assert sum(read) == 10 + 2 + 2 + 4


def test_long_rows_are_read_in_parts(model, monkeypatch):
    rows = rows_of(model, [12, 5])
    whole = score_rows(model, rows, batch_size=2)
    monkeypatch.setattr("lfm.evaluation.scoring.PREFILL_TOKENS", 4)
    assert sampling.PREFILL_TOKENS > 12
    for one, other in zip(whole, score_rows(model, rows, batch_size=2), strict=True):
        torch.testing.assert_close(one.nats, other.nats, rtol=0, atol=TOLERANCE)
