"""How well a model knows when its answers are wrong: every measure of medical mode, from predictions alone.

A prediction is a JSON object a question; whoever has the file can compute every number here again.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lfm.evaluation.calibration import (
    adaptive_error,
    auroc,
    brier,
    equal_mass_bins,
    equal_mass_error,
    error_by_chance,
    log_loss,
    risk_coverage,
    selective_accuracy,
)
from lfm.medical.calibration import (
    Certificate,
    Scaling,
    certify,
    log_odds,
    logistic,
    one_of_each,
    sigmoid,
    thresholds_to_test,
)
from lfm.medical.fitting import halves, scalings_of
from lfm.medical.selective import NO_DEVICE

Prediction = dict[str, Any]

ENOUGH = 100
"""Questions, in a specialty or of a type, for measures of its own."""
_MARKS = {"risk": 0.05, "accuracy_threshold": 0.85}

HEAD, WITHOUT_LIQUID, KNOWN = "head", "head without liquid states", "head at the question"
OPTION = "option probability"
MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ece": equal_mass_error,
    "ace": adaptive_error,
    "brier": brier,
    "nll": log_loss,
    "auroc": auroc,
    "risk_coverage_area": lambda p, right: risk_coverage(p, right).area,
    "coverage_at_5_percent_risk": lambda p, right: risk_coverage(p, right).coverage_at(_MARKS["risk"]),
    "selective_accuracy_at_0.85": lambda p, right: selective_accuracy(p, right, _MARKS["accuracy_threshold"])[0],
    "coverage_at_0.85": lambda p, right: selective_accuracy(p, right, _MARKS["accuracy_threshold"])[1],
}


class Estimate(NamedTuple):
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Table:
    """Predictions by column."""

    rows: Sequence[Prediction]
    right: np.ndarray
    groups: list[str]

    @classmethod
    def of(cls, rows: Sequence[Prediction]) -> "Table":
        right = np.array([bool(row["right"]) for row in rows], dtype=bool)
        return cls(rows, right, [f"{row['source']}: {row['group']}" for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, key: str) -> np.ndarray:
        return np.array([float(row[key]) for row in self.rows])

    def logits(self, head: str) -> np.ndarray:
        return np.array([float(row["logits"][head]) for row in self.rows])

    def where(self, places: np.ndarray) -> "Table":
        return Table.of([self.rows[int(i)] for i in places])


def option_logits(table: Table) -> np.ndarray:
    """Log-probabilities of the options `[n, most]`; -inf where a question has fewer."""
    most = max(len(row["options"]) for row in table.rows)
    return np.array([[*row["options"], *[-np.inf] * (most - len(row["options"]))] for row in table.rows])


def option_temperature(table: Table) -> float:
    """The T with which softmax(option log-probabilities / T) has the least log loss of the right option."""
    z = option_logits(table)
    of_right = z[np.arange(len(z)), [row["right_option"] for row in table.rows]]

    def loss(log_t: float) -> float:
        t = math.exp(log_t)
        return float((np.logaddexp.reduce(z / t, axis=1) - of_right / t).sum())

    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2)


def largest_option(table: Table, t: float) -> np.ndarray:
    z = option_logits(table) / t
    return np.exp(z.max(axis=1) - np.logaddexp.reduce(z, axis=1))


def probabilities(calibration: Table, tested: Table, scalings: Mapping[str, Scaling]) -> dict[str, np.ndarray]:
    """Of each way to tell how sure the model is, on `tested`: each calibrated on `calibration`.

    A head has its scaling; what is no probability goes through a logistic function with two parameters too, the
    options through one temperature, and the base rate is the accuracy.
    """
    names = {"correct": HEAD, "correct_without_liquid": WITHOUT_LIQUID, "known": KNOWN}
    found = {names[head]: of_head(own, tested, head) for head, own in scalings.items()}
    found["base rate"] = np.full(len(tested), calibration.right.mean())
    if all(row["options"] for row in (*calibration.rows, *tested.rows)):
        found[OPTION] = largest_option(tested, option_temperature(calibration))
    for name, (key, told) in _SCORES.items():
        if key in tested.rows[0]:
            slopes, offset = logistic(told(calibration.column(key))[:, None], calibration.right)
            found[name] = sigmoid(slopes * told(tested.column(key)) + offset)
    return found


def of_head(own: Scaling, table: Table, head: str) -> np.ndarray:
    """Calibrated probabilities of a head, by its stored name."""
    return own.probabilities(table.logits(head), table.column("log_probability"))


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


_SCORES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "sequence log-probability": ("log_probability", log_odds),
    "mean token log-probability": ("mean_log_probability", log_odds),
    "P(True)": ("p_true", _as_it_is),
    "agreement of samples": ("agreement", _as_it_is),
    "semantic entropy": ("semantic_entropy", _as_it_is),
}
"""By the name of a method: its column, and what a logistic function is given of it."""


def measured(
    by_method: Mapping[str, np.ndarray], table: Table, *, resamples: int, seed: int = 0
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Measures of each method with 95 % bootstrap intervals, and differences head - other, on the same draws.

    Groups are drawn, not questions: near-copies are right and wrong together.
    """
    members: dict[str, list[int]] = {}
    for place, group in enumerate(table.groups):
        members.setdefault(group, []).append(place)
    each = [np.array(places) for places in members.values()]
    draws = np.random.Generator(np.random.PCG64(seed))
    drawn: dict[str, dict[str, list[float]]] = {name: {key: [] for key in MEASURES} for name in by_method}
    for _ in range(resamples):
        places = np.concatenate([each[i] for i in draws.integers(0, len(each), len(each))])
        for name, p in by_method.items():
            for key, measure in MEASURES.items():
                drawn[name][key].append(measure(p[places], table.right[places]))
    exact = {name: {key: measure(p, table.right) for key, measure in MEASURES.items()} for name, p in by_method.items()}
    found = {
        name: {key: _estimate(exact[name][key], np.array(drawn[name][key])) for key in MEASURES} for name in by_method
    }
    differences = {
        name: {
            key: _estimate(exact[HEAD][key] - exact[name][key], np.array(drawn[HEAD][key]) - np.array(drawn[name][key]))
            for key in ("auroc", "nll", "brier", "risk_coverage_area")
        }
        for name in by_method
        if name != HEAD
    }
    return found, differences


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    drawn = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(drawn):
        return Estimate(_finite(value), None, None)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def selected(p: np.ndarray, right: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """What answering at a threshold does."""
    chosen = p >= threshold if threshold is not None else np.zeros(len(p), bool)
    wrong = int((~right[chosen]).sum())
    return {
        "answered": int(chosen.sum()),
        "coverage": float(chosen.mean()),
        "wrong": wrong,
        "risk": wrong / int(chosen.sum()) if chosen.any() else None,
    }


def broken_down(p: np.ndarray, table: Table, key: str, certified: float | None) -> list[dict[str, Any]]:
    """By specialty, type of question, set or answer given: those with enough questions.  A certificate of all holds for
    none of them by itself."""
    names = [str(row[key]) for row in table.rows]
    found = []
    for name, count in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])):
        if count < ENOUGH:
            continue
        places = np.flatnonzero(np.array([n == name for n in names]))
        sure, right = p[places], table.right[places]
        found.append(
            {
                "name": name,
                "questions": count,
                "accuracy": float(right.mean()),
                "mean_probability": float(sure.mean()),
                "ece": equal_mass_error(sure, right),
                "ece_by_chance": error_by_chance(sure),
                "auroc": _finite(auroc(sure, right)),
                "selective_accuracy_at_0.85": _finite(selective_accuracy(sure, right, 0.85)[0]),
                "coverage_at_0.85": selective_accuracy(sure, right, 0.85)[1],
                "at_certified_threshold": selected(sure, right, certified),
            }
        )
    return found


def violations(
    p: np.ndarray,
    right: np.ndarray,
    groups: Sequence[str],
    thresholds: Sequence[float],
    *,
    calibrate_on: int,
    risk: float,
    delta: float,
    splits: int = 200,
    by_group: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """How often the certified risk is exceeded on the rest of the pool, over random splits of its groups.

    Each split calibrates on so many groups and is tested on the others, with one question a group; with
    `by_group=False` all questions of a group count, as if they were independent, which the guarantee does not allow.
    """
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    number = np.array([names[group] for group in groups])
    draws = np.random.Generator(np.random.PCG64(seed))
    violated, certified, coverages, risks = 0, 0, [], []
    for split in range(splits):
        chosen = one_of_each(list(groups), seed * 1_000_003 + split) if by_group else np.arange(len(p))
        calibrating = draws.permutation(len(names))[:calibrate_on]
        is_calibration = np.isin(number[chosen], calibrating)
        inside, outside = chosen[is_calibration], chosen[~is_calibration]
        found = certify(p[inside], right[inside], thresholds, risk=risk, delta=delta)
        if found.threshold is None:
            continue
        certified += 1
        result = selected(p[outside], right[outside], found.threshold)
        coverages.append(result["coverage"])
        if result["risk"] is not None:
            risks.append(result["risk"])
            violated += result["risk"] > risk
    bound = delta + 2 * math.sqrt(delta * (1 - delta) / splits)
    return {
        "splits": splits,
        "calibrated_on_groups": min(calibrate_on, len(names)),
        "tested_on_groups": len(names) - min(calibrate_on, len(names)),
        "certified": certified,
        "violated": violated,
        "rate": violated / splits,
        "allowed": bound,
        "holds": violated / splits <= bound if certified else None,  # nothing was certified that could be exceeded
        "mean_coverage": float(np.mean(coverages)) if coverages else 0.0,
        "mean_risk": float(np.mean(risks)) if risks else None,
    }


@dataclass(frozen=True)
class ReportConfig:
    risk: float = 0.05
    delta: float = 0.05
    safety_threshold: float = 0.85
    splits: int = 200
    resamples: int = 300


def recalibrated(calibration: Table, heads: Sequence[str]) -> dict[str, Scaling]:
    """As `lfm medical calibrate` finds them, from stored predictions."""
    logits = {head: calibration.logits(head) for head in heads}
    log_probability = calibration.column("log_probability")
    return scalings_of(logits, calibration.right, log_probability, halves(calibration.groups))


def report(
    predictions: Sequence[Prediction],
    scalings: Mapping[str, Scaling],
    certificate: Certificate,
    config: ReportConfig = ReportConfig(),
) -> dict[str, Any]:
    """Everything, as JSON values, from predictions of the parts calibration, test and, if any, shifted."""
    parts = {part: Table.of([row for row in predictions if row["part"] == part]) for part in _parts(predictions)}
    calibration, test = parts["calibration"], parts["test"]
    by_method = probabilities(calibration, test, scalings)
    p = by_method[HEAD]
    applied = None if certificate.threshold is None else max(certificate.threshold, config.safety_threshold)
    measures, differences = measured(by_method, test, resamples=config.resamples)
    thresholds, pool, pool_p, count = _pool(calibration, test, scalings["correct"], config)
    splits = {"risk": config.risk, "delta": config.delta, "splits": config.splits, "calibrate_on": count}
    found: dict[str, Any] = {
        "note": NO_DEVICE,
        "questions": {part: len(table) for part, table in parts.items()},
        "groups": {part: len(set(table.groups)) for part, table in parts.items()},
        "accuracy": {part: float(table.right.mean()) for part, table in parts.items()},
        "scalings": {head: vars(own) for head, own in scalings.items()},
        "certificate": certificate.record(),
        "safety_threshold": config.safety_threshold,
        "applied_threshold": applied,
        "measures": _plain(measures),
        "differences_from_head": _plain(differences),
        "reliability": {
            name: [bin._asdict() for bin in equal_mass_bins(q, test.right)] for name, q in by_method.items()
        },
        "risk_coverage": {name: _curve(q, test.right) for name, q in by_method.items()},
        "at_safety_threshold": selected(p, test.right, config.safety_threshold),
        "at_certified_threshold": selected(p, test.right, certificate.threshold),
        "at_applied_threshold": selected(p, test.right, applied),
        "by_specialty": broken_down(p, test, "specialty", certificate.threshold),
        "by_kind": broken_down(p, test, "kind", certificate.threshold),
        "by_answer": broken_down(p, test, "answer", certificate.threshold),
        "by_source": broken_down(p, test, "source", certificate.threshold),
        "violations": violations(pool_p, pool.right, pool.groups, thresholds, **splits),
        "violations_if_questions_of_a_group_were_independent": violations(
            pool_p, pool.right, pool.groups, thresholds, by_group=False, **splits
        ),
    }
    if "shifted" in parts:
        found["shifted"] = shifted(parts["shifted"], scalings, certificate, applied, config.safety_threshold)
    return found


def _parts(predictions: Sequence[Prediction]) -> list[str]:
    return sorted({row["part"] for row in predictions})


def _pool(
    calibration: Table, test: Table, own: Scaling, config: ReportConfig
) -> tuple[list[float], Table, np.ndarray, int]:
    """Thresholds to test, from the half that the scaling came from; and what is split: the other half and test."""
    half = halves(calibration.groups)
    p = of_head(own, calibration, "correct")
    count = len(half.certificate)
    thresholds = thresholds_to_test(p[half.thresholds], questions=count, risk=config.risk, delta=config.delta)
    pool = Table.of([*(calibration.rows[int(i)] for i in half.all_of_certificate), *test.rows])
    return thresholds, pool, of_head(own, pool, "correct"), count


def shifted(
    table: Table,
    scalings: Mapping[str, Scaling],
    certificate: Certificate,
    applied: float | None,
    safety_threshold: float,
) -> dict[str, Any]:
    """What is left of calibration and guarantee on questions of another kind."""
    p = of_head(scalings["correct"], table, "correct")
    at = selected(p, table.right, certificate.threshold)
    return {
        "sources": sorted({str(row["source"]) for row in table.rows}),
        "ece": equal_mass_error(p, table.right),
        "auroc": _finite(auroc(p, table.right)),
        "at_certified_threshold": at,
        "at_applied_threshold": selected(p, table.right, applied),
        "at_safety_threshold": selected(p, table.right, safety_threshold),
        "risk_above_the_certified": None if at["risk"] is None else at["risk"] - certificate.risk,
        "guarantee": "void: these questions are not exchangeable with those of the calibration",
    }


def _curve(p: np.ndarray, right: np.ndarray, points: int = 200) -> list[tuple[float, float]]:
    found = risk_coverage(p, right)
    places = np.unique(np.linspace(0, len(found.risk) - 1, min(points, len(found.risk))).astype(int))
    return [(float(found.coverage[i]), float(found.risk[i])) for i in places]


def _plain(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {name: {key: list(estimate) for key, estimate in of.items()} for name, of in found.items()}
