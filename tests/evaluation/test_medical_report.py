"""The report of medical mode, computed again from stored predictions by other code."""

import json
import math

import numpy as np
import pytest

from lfm.errors import UserError
from lfm.evaluation.medical import ReportConfig, of_head, recalibrated, report, violations
from lfm.evaluation.medical_page import page
from lfm.evaluation.medical_predictions import from_lines, to_lines
from lfm.medical.calibration import Certificate, certify, logistic, sigmoid, thresholds_to_test
from lfm.medical.fitting import halves

OPTIONS = 4


def simulated(part, n, *, draws, shift=0.0, copies=1):
    """Questions whose answer is right as often as `correct` says, and whose options say a little less."""
    rows = []
    for group in range(n // copies):
        z = draws.normal(2.5, 2)
        is_right = bool(draws.random() < sigmoid(np.array(z - shift)))
        for _ in range(copies):
            answer, wrong = int(draws.integers(OPTIONS)), int(draws.integers(1, OPTIONS))
            options = draws.normal(0, 0.3, OPTIONS)
            options[answer] = options.max() + abs(0.5 * z + draws.normal(0, 1))
            rows.append(
                {
                    **{"part": part, "source": "s", "group": f"{part} {group}"},
                    **{"specialty": f"specialty {answer}", "kind": "k", "answer": f"option {answer}", "reference": "x"},
                    **{"right": is_right, "options": [round(float(x), 4) for x in options]},
                    "right_option": answer if is_right else (answer + wrong) % OPTIONS,
                    "log_probability": round(-float(np.exp(draws.normal() - 0.2 * z)), 5),
                    "mean_log_probability": round(-float(np.exp(draws.normal() - 0.1 * z)), 5),
                    "logits": {"correct": 2 * z, "correct_without_liquid": 2 * z + draws.normal()},
                    **{"p_true": float(draws.normal()), "agreement": 0.5, "semantic_entropy": 1.0},
                }
            )
    return rows


@pytest.fixture(scope="module")
def predictions():
    draws = np.random.Generator(np.random.PCG64(0))
    parts = {"calibration": 2400, "test": 2400}
    rows = [row for part, n in parts.items() for row in simulated(part, n, draws=draws)]
    return rows + simulated("shifted", 600, draws=draws, shift=2.0)


def certificate_of(predictions, risk=0.05, delta=0.05):
    rows = [row for row in predictions if row["part"] == "calibration"]
    half = halves([f"s: {row['group']}" for row in rows])
    from lfm.evaluation.medical import Table

    table = Table.of(rows)
    scalings = recalibrated(table, ["correct", "correct_without_liquid"])
    p = of_head(scalings["correct"], table, "correct")
    tested = half.certificate
    thresholds = thresholds_to_test(p[half.thresholds], questions=len(tested), risk=risk, delta=delta)
    return scalings, certify(p[tested], table.right[tested], thresholds, risk=risk, delta=delta)


@pytest.fixture(scope="module")
def found(predictions):
    scalings, certificate = certificate_of(predictions)
    return report(predictions, scalings, certificate, ReportConfig(splits=200, resamples=20))


def test_every_number_of_the_head_is_found_again_from_the_file(predictions, found, tmp_path):
    """By plain loops over what was written, with the formulas written out."""
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(to_lines(predictions))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == from_lines(file)
    test = [row for row in rows if row["part"] == "test"]
    own, weight, offset = (found["scalings"]["correct"][key] for key in ("head_weight", "answer_weight", "offset"))

    def probability(row):
        of_answer = math.exp(min(row["log_probability"], -1e-5))
        z = own * row["logits"]["correct"] + weight * math.log(of_answer / (1 - of_answer)) + offset
        return 1 / (1 + math.exp(-z))

    pairs = sorted((probability(row), row["right"]) for row in test)
    n, measures = len(pairs), {key: value[0] for key, value in found["measures"]["head"].items()}
    assert measures["brier"] == pytest.approx(sum((p - right) ** 2 for p, right in pairs) / n, abs=1e-9)
    assert measures["nll"] == pytest.approx(-sum(math.log(p if right else 1 - p) for p, right in pairs) / n, abs=1e-9)
    yes, no = [p for p, right in pairs if right], [p for p, right in pairs if not right]
    wins = sum((a > b) + 0.5 * (a == b) for a in yes for b in no)
    assert measures["auroc"] == pytest.approx(wins / len(yes) / len(no), abs=1e-9)
    size = n // 15
    bins = [pairs[i * size : (i + 1) * size] for i in range(15)]
    gaps = [abs(sum(p for p, _ in each) - sum(right for _, right in each)) for each in bins]
    assert measures["ece"] == pytest.approx(sum(gaps) / n, abs=1e-9)
    best, wrong, area = 0.0, 0, 0.0
    for count, (_, right) in enumerate(reversed(pairs), start=1):
        wrong += not right
        area += wrong / count / n
        best = count / n if wrong / count <= 0.05 else best
    assert measures["risk_coverage_area"] == pytest.approx(area, abs=1e-9)
    assert measures["coverage_at_5_percent_risk"] == pytest.approx(best, abs=1e-9)
    given = [right for p, right in pairs if p >= 0.85]
    assert measures["selective_accuracy_at_0.85"] == pytest.approx(sum(given) / len(given), abs=1e-9)
    threshold = found["certificate"]["threshold"]
    given = [right for p, right in pairs if p >= threshold]
    assert found["at_certified_threshold"]["wrong"] == len(given) - sum(given)
    assert found["at_certified_threshold"]["answered"] == len(given)
    assert found["accuracy"]["test"] == pytest.approx(sum(right for _, right in pairs) / n)


def test_the_head_is_calibrated_and_the_stricter_threshold_applies(found):
    assert found["measures"]["head"]["ece"][0] < 0.03
    assert found["applied_threshold"] == max(0.85, found["certificate"]["threshold"])
    assert found["differences_from_head"]["option probability"]["auroc"][1] > 0, "the options were made to say less"
    low, high = found["measures"]["head"]["auroc"][1:]
    assert low < found["measures"]["head"]["auroc"][0] < high
    assert found["measures"]["base rate"]["auroc"][0] == 0.5


def test_the_certified_risk_is_exceeded_no_more_often_than_stated(found):
    assert found["violations"]["certified"] > 150
    assert found["violations"]["rate"] <= found["violations"]["allowed"] and found["violations"]["holds"]


def test_a_shifted_set_breaks_the_guarantee_and_the_page_says_by_how_much(found):
    shifted = found["shifted"]
    assert shifted["risk_above_the_certified"] > 0.1
    assert shifted["ece"] > 0.1
    content = page("a report", found)
    assert "the guarantee is void" in content and f"{shifted['risk_above_the_certified']:+.4f}" in content
    assert "This is not a medical device" in content and content.count("<svg") == 3
    assert "specialty 0" in content and "option 1" in content


def test_copies_of_a_question_taken_for_independent_break_it_too():
    draws = np.random.Generator(np.random.PCG64(5))
    rows = simulated("test", 4000, draws=draws, copies=20)
    right = np.array([row["right"] for row in rows])
    p = sigmoid(np.array([row["logits"]["correct"] / 2 for row in rows]))
    groups = [row["group"] for row in rows]
    thresholds = [float(x) for x in np.quantile(p, np.arange(0.9, 0, -0.05))]
    settings = {"calibrate_on": 60, "risk": 0.1, "delta": 0.05, "splits": 200}
    apart = violations(p, right, groups, thresholds, **settings)
    together = violations(p, right, groups, thresholds, by_group=False, **settings)
    assert apart["rate"] <= apart["allowed"] < together["rate"]


def test_a_logistic_function_is_found_again():
    draws = np.random.Generator(np.random.PCG64(2))
    x = draws.normal(3, 2, 20_000)
    y = draws.normal(0, 3, 20_000)
    slopes, offset = logistic(np.stack([x, y], axis=1), draws.random(20_000) < sigmoid(0.7 * x + 0.3 * y - 2))
    assert (*slopes, offset) == (
        *(pytest.approx(0.7, abs=0.05), pytest.approx(0.3, abs=0.02), pytest.approx(-2, abs=0.15)),
    )


def test_no_certificate_answers_nothing(predictions):
    scalings, _ = certificate_of(predictions)
    none = Certificate(0.05, 0.05, None, 100, 0, 0)
    found = report(predictions, scalings, none, ReportConfig(splits=2, resamples=2))
    assert found["applied_threshold"] is None and found["at_applied_threshold"]["answered"] == 0
    assert "none: nothing is answered" in page("x", found)


def test_a_damaged_file_of_predictions_is_one_sentence(tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_text('{"part": "test"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1 of .* is no prediction"):
        from_lines(file)
