import dataclasses
import math

import numpy as np
import pytest

from lfm.training.certificate import Numbers, compare

STEP = {"loss": 2.0, "cross_entropy": 1.5, "balance_loss": 1.0, "z_loss": 0.5, "norm": 3.0, "clip": 1 / 3}
EXPECTED = Numbers(held_out=1.25, steps=[STEP], gradients={"a": np.ones(4), "b": np.ones(4)})


def _rank(**changes):
    """Both ranks hold `a` whole and a slice each of `b`: (squared difference, squared norm, is a slice)."""
    return {
        "held_out": changes.get("held_out", 1.25),
        "steps": [{key: changes.get(key, value) for key, value in STEP.items()}],
        "gradients": {"a": (changes.get("a", 0.0), 4.0, False), "b": (changes.get("b", 0.0), 2.0, True)},
    }


def test_equal_numbers_are_certified():
    assert compare("layout", EXPECTED, [_rank(), _rank()]).beyond == []


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("name", ["held_out", *STEP, "a", "b"])
@pytest.mark.parametrize("value", [math.nan, 1.1], ids=["nan", "wrong"])
def test_one_wrong_number_on_any_rank_is_found(name, bad_rank, value):
    ranks = [_rank(), _rank()]
    ranks[bad_rank] = _rank(**{name: value})
    assert len(compare("layout", EXPECTED, ranks).beyond) == 1


def test_a_gradient_that_no_rank_has_is_found():
    expected = dataclasses.replace(EXPECTED, gradients={**EXPECTED.gradients, "c": np.ones(4)})
    assert compare("layout", expected, [_rank(), _rank()]).beyond
