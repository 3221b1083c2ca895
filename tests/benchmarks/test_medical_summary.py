"""Means over seeds of benchmarks/medical.py, from reports as its part heads writes them."""

import importlib.util
import itertools
import json
import lzma
import math
import sys

import numpy as np
import pytest

from lfm.errors import UserError
from lfm.evaluation.medical import ReportConfig, report
from tests.evaluation.test_medical_report import certificate_of, simulated
from tests.training.tiny_run import ROOT


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("medical_benchmark", ROOT / "benchmarks/medical.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_each_number_is_the_mean_over_the_seeds_and_bars_are_judged_by_it(benchmark, tmp_path, capsys):
    aurocs = []
    for seed in range(2):
        draws = np.random.Generator(np.random.PCG64(seed))
        rows = [row for part in ("calibration", "test") for row in simulated(part, 600, draws=draws)]
        found = report(rows, *certificate_of(rows), ReportConfig(splits=5, resamples=3))
        found["competence"] = {name: {"accuracy": 0.8} for name in benchmark.SETS}
        found["naive_bayes"] = {name: {"naive Bayes": {"accuracy": 0.7}} for name in benchmark.SETS}
        found["cost"], found["evidence"], found["shifts"] = {"share": 0.001}, {"questions": 0}, {}
        aurocs.append(found["measures"]["head"]["auroc"][0])
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}/report.json").write_text(json.dumps(found), encoding="utf-8")
    benchmark.summary(tmp_path, [0, 1, 2])
    found = json.loads((tmp_path / "summary.json").read_bytes())
    mean = found["measures"]["head"]["auroc"]
    assert found["seeds"] == 2 and mean["values"] == aurocs and mean["mean"] == pytest.approx(sum(aurocs) / 2)
    assert mean["low"] < min(aurocs) and mean["high"] > max(aurocs), "Student's t with one degree of freedom"
    assert found["bars"]["auroc_at_least_0.75"] == (mean["mean"] >= 0.75)
    assert found["comprehensiveness_of_drive_less_random"]["mean"] is None
    assert f"{mean['mean']:.4f}" in capsys.readouterr().out


def test_without_a_report_it_says_what_to_run(benchmark, tmp_path):
    with pytest.raises(UserError, match="has no report of a seed yet; run the part heads"):
        benchmark.summary(tmp_path, [0])
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0/report.json").write_text("{}")
    with pytest.raises(UserError, match=r"report\.json is no report; run the part heads again"):
        benchmark.summary(tmp_path, [0])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--parts", "heads,none"), "--parts has 'none'; there are data, "),
        (("--seeds", "0,a"), "--seeds 0,a is no list of numbers, such as 0,1,2"),
        (("--seeds", ",".join(map(str, range(11)))), "--seeds has 11 seeds, and intervals are known for 10"),
        (("--gpus", "0"), "leave nothing to run with; give more than 0"),
        (("--minutes", "nan"), "leave nothing to run with; give more than 0"),
        (("--parts", "report"), "has no report.json with predictions.jsonl; run the part heads"),
        (("--parts", "heads", "--one-seed", "0"), "has no trained run; run the parts pretrain and finetune first"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(benchmark, tmp_path, monkeypatch, capsys, flags, words):
    arguments = ["medical.py", *(f"--{name}={tmp_path / name}" for name in ("data", "out", "work")), *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_recorded_numbers_are_those_of_the_recorded_predictions(seed):
    """By loops and formulas of its own, from what is in the repository."""
    with lzma.open(ROOT / "benchmarks/results/medical_predictions.json.xz") as file:
        of = json.load(file)[seed]
    recorded = json.loads((ROOT / "benchmarks/results/medical.json").read_bytes())["of_seed"][seed]
    own, certificate = recorded["scalings"]["correct"], recorded["certificate"]

    def probability(logit, log_probability):
        log_probability = min(log_probability, -1e-5)
        of_answer = log_probability - math.log(-math.expm1(log_probability))
        return 1 / (1 + math.exp(-(own["head_weight"] * logit + own["answer_weight"] * of_answer + own["offset"])))

    p = [probability(*pair) for pair in zip(of["correct"], of["log_probability"], strict=True)]
    test = [i for i, part in enumerate(of["part"]) if part == "test"]
    pairs = sorted((p[i], of["right"][i]) for i in test)
    n, head = len(pairs), recorded["head"]
    assert n == 10_858 and {of["part"][i] for i in range(len(p))} == {"calibration", "test"}
    ranks, at = {}, 0
    for value, same in itertools.groupby(q for q, _ in pairs):
        count = len(list(same))
        ranks[value], at = at + (count + 1) / 2, at + count
    positives = sum(right for _, right in pairs)
    wins = sum(ranks[q] for q, right in pairs if right) - positives * (positives + 1) / 2
    assert head["auroc"] == pytest.approx(wins / positives / (n - positives), abs=1e-9)
    assert head["brier"] == pytest.approx(sum((q - right) ** 2 for q, right in pairs) / n, abs=1e-9)
    assert head["nll"] == pytest.approx(-sum(math.log(q if right else 1 - q) for q, right in pairs) / n, abs=1e-9)
    bounds = [round(i * n / 15) for i in range(16)]
    bins = [pairs[a:b] for a, b in itertools.pairwise(bounds)]
    gaps = [abs(sum(q for q, _ in each) - sum(right for _, right in each)) for each in bins]
    assert head["ece"] == pytest.approx(sum(gaps) / n, abs=1e-6)
    given = [right for q, right in pairs if q >= certificate["threshold"]]
    at_threshold = recorded["at_certified_threshold"]
    assert (at_threshold["answered"], at_threshold["wrong"]) == (len(given), len(given) - sum(given))


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_certified_risk_is_exceeded_as_seldom_as_is_recorded(seed):
    """Other splits than the recorded ones, of one question a group, and a certificate of its own."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which scikit-learn of the extra `lm-eval` brings")
    with lzma.open(ROOT / "benchmarks/results/medical_predictions.json.xz") as file:
        of = json.load(file)[seed]
    recorded = json.loads((ROOT / "benchmarks/results/medical.json").read_bytes())["of_seed"][seed]
    own, risk, delta = recorded["scalings"]["correct"], 0.05, 0.05
    sums = np.minimum(np.array(of["log_probability"]), -1e-5)
    z = own["head_weight"] * np.array(of["correct"]) + own["offset"]
    z += own["answer_weight"] * (sums - np.log(-np.expm1(sums)))
    right, group, half, part = (np.array(of[key]) for key in ("right", "group", "half", "part"))
    draws = np.random.Generator(np.random.PCG64(int(seed) + 77))
    first = z[(part == "calibration") & (half == 0)]
    pool = np.flatnonzero((part == "test") | (half == 1))
    thresholds = np.quantile(first, np.linspace(0.6, 0, 25))
    tail = stats.binom.cdf
    violated, splits = 0, 200
    for _ in range(splits):
        shuffled = draws.permutation(pool)
        _, places = np.unique(group[shuffled], return_index=True)
        chosen = draws.permutation(shuffled[places])
        inside, outside = chosen[:1549], chosen[1549:]
        certified = None
        for threshold in thresholds:
            answered = right[inside][z[inside] >= threshold]
            if tail(len(answered) - answered.sum(), len(answered), risk) > delta:
                break
            certified = threshold
        if certified is not None:
            answered = right[outside][z[outside] >= certified]
            violated += (len(answered) - answered.sum()) / len(answered) > risk
    assert violated / splits <= delta + 2 * math.sqrt(delta * (1 - delta) / splits), violated
    assert recorded["violations"]["rate"] <= recorded["violations"]["allowed"]
