"""The serving benchmark runs whole on a CPU, in small."""

import json
import subprocess

import pytest

from tests.training.tiny_run import PYTHON, ROOT


@pytest.mark.slow
def test_a_dry_run_measures_every_section(tmp_path):
    out = tmp_path / "serving.json"
    command = [PYTHON, "benchmarks/serving.py", "--dry-run", "--configs", "liquidnet_debug", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["section"] for row in rows} == {"speed", "first_token", "memory"}
    assert all(row["tokens_per_second_transformers"] > 0 for row in rows if row["section"] == "speed")
