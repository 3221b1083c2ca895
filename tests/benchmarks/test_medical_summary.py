"""Means over seeds of benchmarks/medical.py, from reports as its part heads writes them."""

import importlib.util
import json
import sys

import numpy as np
import pytest

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
    with pytest.raises(SystemExit, match="has no report of a seed yet; run the part heads"):
        benchmark.summary(tmp_path, [0])
