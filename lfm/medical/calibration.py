"""From a head's logit to a probability, and from probabilities to a threshold with a stated guarantee."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm.errors import UserError


@dataclass(frozen=True)
class Scaling:
    """From a head's logit to a probability: sigmoid(head_weight * logit + answer_weight * log-odds + offset), with the
    log-odds of the answer's probability by the model itself."""

    head_weight: float
    """1 / temperature; 0 of a head that tells nothing."""
    answer_weight: float
    """0 of a head that judges no answer."""
    offset: float

    def probabilities(self, logits: np.ndarray, log_probability: np.ndarray) -> np.ndarray:
        """Of heads' logits and the summed log-probabilities of the answers, all `[n]`; float64."""
        of_head = self.head_weight * np.asarray(logits, np.float64)
        return sigmoid(of_head + self.answer_weight * log_odds(log_probability) + self.offset)


def scaling(logits: np.ndarray, right: np.ndarray, log_probability: np.ndarray | None = None) -> Scaling:
    """That with the least mean log loss (Platt 1999) of those whose weights are not negative.

    A temperature alone (Guo et al. 2017, arXiv 1706.04599) draws what is too sure towards one half, also where four
    answers in five are right.  Of some thousand questions a head learns chance as well, and may end up knowing less
    than the answer's probability, which it reads: so that is weighed once more, by questions that the head did not see.
    What tells nothing, or the contrary, has no weight; where neither tells anything the base rate is left.
    """
    columns = {"head_weight": np.asarray(logits, np.float64)}
    if log_probability is not None:
        columns["answer_weight"] = log_odds(log_probability)
    neither = {"head_weight": 0.0, "answer_weight": 0.0}
    found = [Scaling(**neither, offset=float(np.log(right.mean() / (1 - right.mean()))))]
    for names in ([*columns], *([name] for name in columns)):
        slopes, offset = logistic(np.stack([columns[name] for name in names], axis=1), right)
        if (slopes > 0).all():
            found.append(Scaling(**{**neither, **dict(zip(names, slopes.tolist(), strict=True))}, offset=offset))

    def loss(scaling: Scaling) -> float:
        z = sum(
            (getattr(scaling, name) * column for name, column in columns.items()), np.full(len(right), scaling.offset)
        )
        return float(np.logaddexp(0, np.where(right, -z, z)).mean())

    return min(found, key=loss)


def log_odds(log_probability: np.ndarray) -> np.ndarray:
    """Of probabilities given by their logarithm, of which five digits are kept in files: -1e-5 at most."""
    x = np.minimum(np.asarray(log_probability, np.float64), -1e-5)
    return x - np.log(-np.expm1(x))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def logistic(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """(slopes `[k]`, offset) of sigmoid(scores @ slopes + offset), of scores `[n, k]`, with the least log loss on
    standardised ones, by Newton's method; a weak pull to 0 keeps it finite where the classes do not overlap."""
    mean, scale = scores.mean(axis=0), scores.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x = np.concatenate([(scores - mean) / scale, np.ones((len(scores), 1))], axis=1)
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - right) + 1e-2 * w
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(len(w)), gradient)
        w -= step
        if np.abs(step).max() < 1e-10:
            break
    slopes = w[:-1] / scale
    return slopes, float(w[-1] - slopes @ mean)


def binomial_tail(errors: int, answered: int, risk: float) -> float:
    """P(at most so many errors among the answered), if each is wrong with probability `risk`: an exact p-value of "the
    risk is above `risk`"."""
    if answered == 0:
        return 1.0
    k = np.arange(errors + 1)
    log_choose = [math.lgamma(answered + 1) - math.lgamma(i + 1) - math.lgamma(answered - i + 1) for i in k]
    logs = np.array(log_choose) + k * math.log(risk) + (answered - k) * math.log1p(-risk)
    return min(1.0, float(np.exp(logs - logs.max()).sum() * np.exp(logs.max())))


def fewest_needed(risk: float, delta: float) -> int:
    """Questions that must be answered, all of them right, before any threshold can be certified."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


@dataclass(frozen=True)
class Certificate:
    """P(wrong | answered) <= risk for answers with a probability of at least `threshold`, with probability 1 - delta
    over draws of the calibration questions, for questions exchangeable with them."""

    risk: float
    delta: float
    threshold: float | None
    """None: no threshold could be certified, so that nothing is answered."""
    questions: int
    """That it was tested on, one of a group."""
    answered: int
    """Of them, at this threshold."""
    wrong: int

    def record(self) -> dict[str, Any]:
        return dict(vars(self))


def thresholds_to_test(probabilities: np.ndarray, *, questions: int, risk: float, delta: float) -> list[float]:
    """Thresholds from strict to lax, from probabilities of questions that are not those of the test.

    The first is where about three times as many of `questions` are answered as are needed at least, so that a few
    errors do not end the sequence before it began; of few questions half, or the fewest and a quarter more.  Then 2.5 %
    more at a time, to all.
    """
    least = fewest_needed(risk, delta) / max(1, questions)
    first = min(1.0, 3 * least, max(1.25 * least, 0.5))
    coverages = [*np.arange(first, 1.0, 0.025), 1.0]
    found = np.quantile(probabilities, [1 - coverage for coverage in coverages])
    return [float(threshold) for threshold in dict.fromkeys(found)]


def certify(
    probabilities: np.ndarray, right: np.ndarray, thresholds: Sequence[float], *, risk: float, delta: float
) -> Certificate:
    """Fixed-sequence testing: the laxest threshold before the first whose exact p-value passes `delta`.

    Angelopoulos et al. (Learn then Test, arXiv 2110.01052), section 3 and appendix; questions must be independent,
    which those of one group are not, and the thresholds must not depend on them.
    """
    found, answered, wrong = None, 0, 0
    for threshold in thresholds:
        chosen = probabilities >= threshold
        count, errors = int(chosen.sum()), int((~right[chosen]).sum())
        if binomial_tail(errors, count, risk) > delta:
            break
        found, answered, wrong = threshold, count, errors
    return Certificate(risk, delta, found, len(right), answered, wrong)


def one_of_each(groups: Sequence[str], seed: int) -> np.ndarray:
    """Places of one question of each group, drawn by `seed`: near-copies are right and wrong together."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))
    last = {groups[place]: place for place in order}
    return np.array(sorted(last.values()), dtype=np.int64)


def check_size(groups: int, *, risk: float, delta: float, source: str) -> None:
    """Raise UserError where not even without an error a threshold could be certified."""
    needed = fewest_needed(risk, delta)
    if groups < needed:
        raise UserError(
            f"{source} has {groups} groups of questions for the threshold, and a risk of {risk:g} at delta {delta:g} "
            f"takes {needed} answered ones at least, all right; give {2 * needed} groups in all, or a higher --risk"
        )
