"""Temperature, exact p-values and certified thresholds: checked by themselves, by simulation and against peers."""

import numpy as np
import pytest

from lfm.errors import UserError
from lfm.evaluation.calibration import log_loss
from lfm.medical.calibration import (
    binomial_tail,
    certify,
    check_size,
    fewest_needed,
    log_odds,
    one_of_each,
    scaling,
    sigmoid,
    thresholds_to_test,
)
from lfm.medical.fitting import halves

stats = pytest.importorskip("scipy.stats", reason="needs scipy, which scikit-learn of the extra `lm-eval` brings")


@pytest.mark.parametrize(
    "errors, answered, risk", [(0, 59, 0.05), (3, 200, 0.05), (90, 100, 0.5), (7, 7, 0.01), (0, 1, 0.9)]
)
def test_the_p_value_is_the_binomial_distribution(errors, answered, risk):
    assert binomial_tail(errors, answered, risk) == pytest.approx(stats.binom.cdf(errors, answered, risk), rel=1e-9)


def test_nothing_answered_proves_nothing():
    assert binomial_tail(0, 0, 0.05) == 1.0


def test_so_many_are_needed_and_one_less_is_too_few():
    for risk, delta in [(0.05, 0.05), (0.1, 0.1), (0.01, 0.05)]:
        n = fewest_needed(risk, delta)
        assert binomial_tail(0, n, risk) <= delta < binomial_tail(0, n - 1, risk)
    check_size(59, risk=0.05, delta=0.05, source="x")
    with pytest.raises(
        UserError, match=r"58 groups of questions .* takes 59 answered ones at least, all right; give 118"
    ):
        check_size(58, risk=0.05, delta=0.05, source="the calibration part")


def test_the_scaling_has_the_least_log_loss():
    draws = np.random.Generator(np.random.PCG64(0))
    logits = draws.normal(0, 2, 20_000)
    right = draws.random(20_000) < sigmoid(logits / 3 + 1)
    found = scaling(logits, right)
    assert (found.head_weight, found.offset) == (pytest.approx(1 / 3, rel=0.05), pytest.approx(1, rel=0.05))
    assert found.answer_weight == 0, "no answer was given"

    def loss(weight, offset):
        return np.logaddexp(0, np.where(right, -1, 1) * (weight * logits + offset)).mean()

    least = loss(found.head_weight, found.offset)
    for near in (0.97, 1.03):
        assert loss(near * found.head_weight, found.offset) > least < loss(found.head_weight, near * found.offset)


def test_the_scaling_of_an_answer_keeps_what_its_own_probability_says():
    draws = np.random.Generator(np.random.PCG64(0))
    logits, sums = draws.normal(0, 2, 20_000), -draws.exponential(0.5, 20_000)
    truth = logits / 3 + 0.5 * log_odds(sums) + 1
    right = draws.random(20_000) < sigmoid(truth)
    found = scaling(logits, right, sums)
    assert found.head_weight == pytest.approx(1 / 3, rel=0.05) and found.answer_weight == pytest.approx(0.5, rel=0.05)
    assert np.abs(found.probabilities(logits, sums) - sigmoid(truth)).max() < 0.03
    assert log_odds(np.log([0.2, 0.9])) == pytest.approx([np.log(0.25), np.log(9)])


@pytest.mark.parametrize("sure", ["head", "answer"])
def test_of_head_and_answer_what_tells_the_contrary_has_no_weight(sure):
    draws = np.random.Generator(np.random.PCG64(0))
    logits, sums = draws.normal(0, 2, 5000), -draws.exponential(0.5, 5000)
    z = logits - log_odds(sums) if sure == "head" else log_odds(sums) - logits
    found = scaling(logits, draws.random(5000) < sigmoid(z), sums)
    if sure == "head":
        assert found.answer_weight == 0 and 0.2 < found.head_weight < 1
    else:
        assert found.head_weight == 0 and found.answer_weight > 0


@pytest.mark.parametrize("scale", [1, 100])
def test_of_two_that_look_useless_together_the_one_that_helps_is_kept(scale):
    """Both weights may be negative together where one of them alone tells a lot."""
    draws = np.random.Generator(np.random.PCG64(3))
    sums = -draws.exponential(0.5, 5000)
    logits = scale * (draws.normal(0, 0.3, 5000) - log_odds(sums))
    right = draws.random(5000) < sigmoid(logits / scale)
    found = scaling(logits, right, sums)
    p = found.probabilities(logits, sums)
    alone = scaling(logits, right).probabilities(logits, sums)
    assert log_loss(p, right) <= log_loss(alone, right) < 0.9 * log_loss(np.full(5000, right.mean()), right)


@pytest.mark.parametrize("sign", [0, -1])
def test_logits_that_tell_nothing_or_the_contrary_leave_the_base_rate(sign):
    draws = np.random.Generator(np.random.PCG64(0))
    logits = 5 * draws.standard_cauchy(2000)
    right = draws.random(2000) < (0.8 if sign == 0 else sigmoid(-logits))
    found = scaling(logits if sign else np.ones(2000), right)
    p = found.probabilities(logits, np.full(2000, -0.5))
    assert found.answer_weight == 0 and p == pytest.approx(right.mean(), abs=1e-3)


def population(draws, n, *, flipped=0.0):
    """Calibrated probabilities, and answers that are right as often as they say; of a shifted one some are not."""
    p = draws.beta(4, 1, n)
    right = draws.random(n) < p
    return p, np.where(draws.random(n) < flipped, draws.random(n) < 0.5, right)


RISK, DELTA, N = 0.1, 0.1, 500


def simulated(flipped, *, runs=600):
    """Share of calibration draws whose certified threshold has a true risk above RISK, the true risk being known."""
    draws = np.random.Generator(np.random.PCG64(1))
    reference, right = population(draws, 200_000, flipped=flipped)
    order = np.argsort(-reference)
    risk_at = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    sorted_p, violated, certified = reference[order], 0, 0
    for _ in range(runs):
        before, _ = population(draws, N)
        thresholds = thresholds_to_test(before, questions=N, risk=RISK, delta=DELTA)
        found = certify(*population(draws, N), thresholds, risk=RISK, delta=DELTA)
        if found.threshold is not None:
            certified += 1
            count = int(np.searchsorted(-sorted_p, -found.threshold, side="right"))
            violated += risk_at[count - 1] > RISK
    return violated / runs, certified / runs


def test_the_bound_holds_at_its_level_and_breaks_under_shift():
    rate, certified = simulated(flipped=0.0)
    assert certified > 0.9
    assert rate <= DELTA + 2 * (DELTA * (1 - DELTA) / 600) ** 0.5
    shifted, _ = simulated(flipped=0.3, runs=100)
    assert shifted > 0.9, "what was certified on other questions says nothing of these"


def test_the_threshold_stops_at_the_first_that_fails():
    p = np.repeat([0.9, 0.8, 0.7], 100)
    right = np.ones(300, bool)
    right[100:130] = False  # at 0.8
    found = certify(p, right, [0.9, 0.8, 0.7], risk=0.05, delta=0.05)
    assert (found.threshold, found.answered, found.wrong) == (0.9, 100, 0), "0.7 is not tried after 0.8 failed"
    assert certify(p, ~right, [0.9, 0.8], risk=0.05, delta=0.05).threshold is None


def test_one_question_of_each_group_is_drawn_alike_by_seed():
    groups = [f"g{i // 3}" for i in range(30)]
    chosen = one_of_each(groups, 0)
    assert [i // 3 for i in chosen] == list(range(10)) and (chosen == one_of_each(groups, 0)).all()
    assert {int(one_of_each(groups, seed)[0]) for seed in range(30)} == {0, 1, 2}


def test_thresholds_begin_where_a_few_errors_can_be_borne():
    p = np.linspace(0, 1, 1000)
    found = thresholds_to_test(p, questions=590, risk=0.05, delta=0.05)
    assert found[0] == pytest.approx(0.7, abs=0.01) and found[-1] == 0.0 and found == sorted(found, reverse=True)


def test_the_same_threshold_as_mapie():
    risk_control = pytest.importorskip("mapie.risk_control", reason="needs mapie, of the extra `dev`")
    draws = np.random.Generator(np.random.PCG64(3))
    p, right = population(draws, 2000)
    thresholds = list(np.round(np.arange(0.95, 0.4, -0.05), 2))
    ours = certify(p, right, thresholds, risk=0.1, delta=0.1)
    # Precision of a classifier that says "right" at a threshold: 1 - precision is the risk among the answers given.
    controller = risk_control.BinaryClassificationController(
        predict_function=lambda X: np.stack([1 - X[:, 0], X[:, 0]], axis=1),
        risk="precision",
        target_level=0.9,
        confidence_level=0.9,
        list_predict_params=np.array(thresholds),
        fwer_method="fixed_sequence",
    )
    controller.calibrate(p[:, None], right.astype(int))
    assert min(controller.valid_predict_params) == pytest.approx(ours.threshold)


@pytest.mark.parametrize("count, least", [(118, 25), (150, 60), (215, 60), (300, 60)])
def test_of_few_questions_a_head_that_knows_is_certified(count, least):
    """Answering all would be wrong in two of five: the sequence must not begin there.  Of 118 it has to begin with 74,
    of which so many are right in one of three draws."""
    draws, certified = np.random.Generator(np.random.PCG64(3)), 0
    for _ in range(100):
        before, right = draws.random(count) < 0.6, draws.random(count) < 0.6
        p_before, p = (np.where(of, 0.9, 0.1) + draws.random(count) / 100 for of in (before, right))
        thresholds = thresholds_to_test(p_before, questions=count, risk=0.05, delta=0.05)
        certified += certify(p, right, thresholds, risk=0.05, delta=0.05).threshold is not None
    assert certified >= least


def test_large_groups_do_not_choose_the_first_thresholds():
    groups = ["large"] * 300 + [f"g{i}" for i in range(1200)]
    half = halves(groups)
    for places in (half.thresholds, half.certificate):
        names = [groups[int(place)] for place in places]
        assert len(set(names)) == len(names)
    assert {groups[int(i)] for i in half.thresholds} == {groups[int(i)] for i in half.scaling}
