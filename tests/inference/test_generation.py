"""The choice of one token from its logits, and what the keys of sampling say."""

import pytest
import torch
from pydantic import ValidationError

from lfm.inference.sampling import SamplingConfig, choose


def draws(logits: list[float], sampling: SamplingConfig, count: int = 200) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose(torch.tensor(logits), sampling, generator) for _ in range(count)}


def test_of_equally_likely_tokens_the_first_are_chosen():
    logits = [0.0, 3.0, 1.0, 3.0, 3.0, 1.0] * 9
    assert draws(logits, SamplingConfig(greedy=True), count=2) == {1}
    assert draws(logits, SamplingConfig(top_k=2, top_p=1.0)) == {1, 3}
    assert draws([0.0] * 64, SamplingConfig(top_k=0, top_p=0.04)) == {0, 1, 2}


def test_keys_that_greedy_does_not_use_are_not_judged():
    for unused in ({"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}):
        assert SamplingConfig.model_validate(unused | {"greedy": True}).greedy
        with pytest.raises(ValidationError, match="for the most likely token use greedy"):
            SamplingConfig.model_validate(unused)


def test_min_p_keeps_tokens_of_a_share_of_the_most_likely_ones_probability():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    sampling = {"top_k": 0, "top_p": 1.0}
    assert draws(logits, SamplingConfig(**sampling)) == {0, 1, 2, 3}
    assert draws(logits, SamplingConfig(**sampling, min_p=0.45)) == {0, 1, 2}
    assert draws(logits, SamplingConfig(**sampling, min_p=1.0)) == {0}


def test_a_repetition_penalty_makes_what_was_seen_less_likely_on_both_sides_of_zero():
    greedy = SamplingConfig(greedy=True, repetition_penalty=2.0)
    seen, generator = torch.tensor([True, False, False]), torch.Generator()
    assert choose(torch.tensor([3.0, 1.6, 0.0]), greedy, generator, seen) == 1
    assert choose(torch.tensor([3.0, 1.4, 0.0]), greedy, generator, seen) == 0
    assert choose(torch.tensor([-1.0, -1.9, -9.0]), greedy, generator, seen) == 1
    assert choose(torch.tensor([-1.0, -2.1, -9.0]), greedy, generator, seen) == 0
    assert choose(torch.tensor([3.0, 1.6, 0.0]), greedy, generator, ~seen) == 0
