"""`benchmarks/scale_out.py` as a dry run over gloo; its speeds mean nothing."""

import json
import subprocess

import pytest

from benchmarks.model.collectives import CONNECTIONS, bus_bytes
from tests.training.tiny_run import PYTHON, ROOT, tiny_overrides


def scale_out(*flags):
    command = [PYTHON, str(ROOT / "benchmarks/scale_out.py"), "--gpus", "2", "--device", "cpu", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--parts", "speed,none"], "--parts speed,none"),
        (["--only", "dp3"], "--only dp3"),
        (["--baseline", "/nowhere"], "no checkout"),
    ],
)
def test_flags_that_name_nothing_are_refused(flags, words, tmp_path):
    found = scale_out("--out", tmp_path / "found.json", *flags)
    assert found.returncode == 2 and words in found.stderr.splitlines()[-1]


def test_bus_bytes_are_those_of_nccl_tests():
    assert bus_bytes("all_reduce", 100, 4) == 150 and bus_bytes("reduce_scatter", 100, 4) == 75
    assert bus_bytes("send_receive", 100, 2) == 100 and bus_bytes("all_to_all", 100, 2) == 50


@pytest.mark.slow
def test_parts_gather_in_one_record(tmp_path, text_data):
    """Certificate, NCCL's part over gloo, and speeds, in three calls, the last with this checkout as its baseline."""
    out = tmp_path / "found.json"
    keys = [*tiny_overrides(tmp_path / "runs", text_data), "model.attention.num_query_groups=2"]
    short = ["--config", "configs/lfm_debug.yaml", "--out", out, "--rows-per-gpu", 2, "--warmup", 1, "--steps", 2]
    for flags in (
        ["--parts", "nccl"],
        ["--parts", "certificate", "--only", "ep2"],
        ["--parts", "speed", "--only", "one,ep2,dp2_z1", "--baseline", ROOT],
    ):
        found = scale_out(*short, *flags, *keys)
        assert found.returncode == 0, found.stderr[-3000:]
    assert "dp2_z1: no speed, its certificate is missing" in found.stdout
    result = json.loads(out.read_text())
    assert [row["connections"] for row in result["nccl"]] == list(CONNECTIONS)
    assert {row["collective"] for row in result["nccl"][0]["rows"]} >= {"all_reduce", "all_to_all", "send_receive"}
    for layouts, names in (
        (result["layouts"], ["one", "ep2"]),
        (result["before"]["layouts"], ["one", "dp2_z1", "ep2"]),
    ):
        assert [row["name"] for row in layouts] == names
    one, ep2 = result["layouts"]
    for row in (one, ep2):
        assert sum(row["waterfall"]["parts"].values()) == pytest.approx(row["step_ms"], rel=0.01)
        assert set(row["balanced"]["expert_load_max_over_mean"]) == {1.0}
    assert ep2["waterfall"]["parts"]["exchange"] > 0 == one["waterfall"]["parts"]["exchange"]


@pytest.mark.slow
def test_a_layout_for_which_there_is_no_time_is_named(tmp_path, text_data):
    keys = tiny_overrides(tmp_path / "runs", text_data)
    short = ["--config", "configs/lfm_debug.yaml", "--out", tmp_path / "found.json", "--rows-per-gpu", 2]
    found = scale_out(*short, "--parts", "speed", "--only", "one", "--minutes", 0.1, *keys)
    assert found.returncode == 0 and "call again with --only one" in found.stdout
