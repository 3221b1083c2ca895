"""The head: what it is, what it learns from perfect and from no information, and what it takes."""

import numpy as np
import pytest
import torch

from lfm import LFM3BConfig
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.calibration import auroc
from lfm.medical.features import Features, recurrent_states
from lfm.medical.fitting import cost_of
from lfm.medical.head import HeadConfig, UncertaintyHead, fit
from lfm.models.lfm import LFMState
from lfm.models.liquidlm import LiquidLMState

CONFIG = HeadConfig(hidden_size=8, num_liquid=2, liquid_size=6, projection_size=4, width=16)


def features(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, liquid, scalars = (torch.randn(shape, generator=generator) for shape in ((n, 8), (n, 2, 6), (n, 4)))
    # Log-probabilities, and entropies.
    return Features(hidden, liquid, torch.cat([-scalars[:, :2].exp(), scalars[:, 2:].exp()], dim=1))


def groups(n):
    return [f"g{i}" for i in range(n)]


def test_the_head_of_lfm_3b_has_the_parameters_and_the_cost_that_were_stated():
    config = HeadConfig(hidden_size=3072, num_liquid=5, liquid_size=1536)
    with torch.device("meta"):
        head = UncertaintyHead(config)
    assert config.num_inputs == 3396
    assert sum(parameter.numel() for parameter in head.parameters()) == config.num_parameters == 1_361_729

    class OfOneToken:
        num_tokens = 1

        def __len__(self):
            return 1

    assert cost_of(head, OfOneToken(), LFM3BConfig()).share < 1e-3, "of reading a single token"


@pytest.mark.parametrize("place", ["hidden", "liquid", "scalars"])
def test_perfect_information_anywhere_in_its_input_is_learnt(place):
    draws = np.random.Generator(np.random.PCG64(0))
    right, n = draws.random(1000) < 0.6, 1000
    known, unseen = features(n), features(n, seed=1)
    unseen_right = draws.random(n) < 0.6
    for each, answers in ((known, right), (unseen, unseen_right)):
        low, high = (-3.0, -0.01) if place == "scalars" else (-3.0, 3.0)
        getattr(each, place).view(n, -1)[:, 1] = torch.from_numpy(np.where(answers, high, low))
    head = fit(known, right, groups(n), CONFIG)
    assert auroc(head.logits(unseen), unseen_right) == 1.0


def test_how_sure_a_sure_model_is_can_be_told_apart():
    """Log-probabilities between -0.1 and -1e-4 are close together as they are."""
    n, draws = 1000, np.random.Generator(np.random.PCG64(0))
    of, unseen = features(n), features(n, seed=1)
    for each in (of, unseen):
        each.scalars[:, :2] = torch.from_numpy(-(10.0 ** draws.uniform(-4, -1, (n, 1)))).float()
        each.scalars[: n // 50, :2] = -5.0  # a few of which it is not sure at all
        each.scalars[:, 2] = 0.0  # and an entropy that rounding made nothing of
    surer = {id(each): each.scalars[:, 0].numpy() > -(10.0**-2.5) for each in (of, unseen)}
    head = fit(of, surer[id(of)], groups(n), CONFIG)
    assert auroc(head.logits(unseen), surer[id(unseen)]) > 0.99
    assert np.isfinite(head.logits(Features(of.hidden, of.liquid, torch.zeros(n, 4)))).all()


def test_without_liquid_states_it_does_not_read_them():
    n, draws = 400, np.random.Generator(np.random.PCG64(0))
    right = draws.random(n) < 0.5
    of = features(n)
    of.liquid.view(n, -1)[:, 0] = torch.from_numpy(np.where(right, 3.0, -3.0))
    config = CONFIG.model_copy(update={"num_liquid": 0, "liquid_size": 0})
    head = fit(of, right, groups(n), config)
    changed = Features(of.hidden, of.liquid + 1, of.scalars)
    assert (head.logits(of) == head.logits(changed)).all()


def test_shuffled_labels_teach_nothing():
    n, draws = 2000, np.random.Generator(np.random.PCG64(0))
    of = features(n)
    right = draws.permutation(np.where(of.hidden[:, 0].numpy() > 0, True, False))
    head = fit(of, right, groups(n), CONFIG)
    unseen = features(4000, seed=2)
    assert auroc(head.logits(unseen), unseen.hidden[:, 0].numpy() > 0) == pytest.approx(0.5, abs=0.1)
    assert np.abs(head.logits(unseen)).max() < 1.5, "it stays near the base rate"


def test_fitting_is_the_same_again_and_leaves_torch_s_draws_alone():
    right = np.arange(200) % 3 > 0
    torch.manual_seed(5)
    one = fit(features(200), right, groups(200), CONFIG).logits(features(10, seed=3))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    assert (fit(features(200), right, groups(200), CONFIG).logits(features(10, seed=3)) == one).all()


def test_answers_that_teach_nothing_are_refused():
    for right, what in ((np.ones(50, bool), "right"), (np.zeros(50, bool), "wrong")):
        with pytest.raises(UserError, match=f"all 50 answers of the model are {what}"):
            fit(features(50), right, groups(50), CONFIG)
    with pytest.raises(UserError, match="too few to fit a head"):
        fit(features(10), np.arange(10) % 2 > 0, groups(10), CONFIG)
    broken = features(50)
    broken.hidden[3, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        fit(broken, np.arange(50) % 2 > 0, groups(50), CONFIG)


def test_recurrent_states_are_found_and_caches_are_none():
    liquid = LFMState(torch.ones(2).long(), [], {0: torch.ones(2, 3, 4), 2: 2 * torch.ones(2, 3, 4)})
    found = recurrent_states(liquid)
    assert found is not None and found.shape == (2, 2, 12) and found[:, 1].eq(2).all()
    found = recurrent_states(LiquidLMState(torch.ones(2, 4, 5), torch.zeros(2, 4, 5), torch.ones(2).long()))
    assert found is not None and found.shape == (2, 4, 5) and found.eq(1).all(), "cells are left out"
    assert recurrent_states(LFMState(torch.ones(2).long(), [], {})) is None


def test_what_is_far_less_likely_than_all_it_was_fitted_on_is_never_surer():
    """Among likely answers the less likely ones are right here: a slope that must not be followed further."""
    n, draws = 600, np.random.Generator(np.random.PCG64(0))
    of = features(n)
    logs = draws.uniform(-1.0, -0.1, n)
    of.scalars[:, 0] = of.scalars[:, 1] = torch.from_numpy(logs).float()
    of.scalars[:, 2] = 0.5
    head = fit(of, logs < -0.5, groups(n), CONFIG)
    least = float(head.logits(of).min())
    far = Features(of.hidden, of.liquid, of.scalars.clone())
    for value in (-3.0, -10.0, -100.0):
        far.scalars[:, 0] = far.scalars[:, 1] = value
        assert head.outside(far).all() and (head.logits(far) <= least).all()
    wide = Features(of.hidden, of.liquid, of.scalars.clone())
    wide.scalars[:, 2] = 5.0
    assert head.outside(wide).all() and (head.logits(wide) <= least).all()
    assert not head.outside(of).any()
