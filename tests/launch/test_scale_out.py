"""`benchmarks/scale_out.py` as a dry run over gloo; its speeds mean nothing."""

import json
import os
import subprocess

import pytest

from benchmarks.model.collectives import CONNECTIONS, bus_bytes
from tests.training.tiny_run import PYTHON, ROOT, tiny_overrides


def scale_out(*flags):
    command = [PYTHON, str(ROOT / "benchmarks/scale_out.py"), "--gpus", "2", "--device", "cpu", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


SMALL = ("--config", "configs/lfm_debug.yaml")
SPEED = (*SMALL, "--parts", "speed")
MISTAKES = (
    (("--parts", "speed,none"), "--parts none is not one of certificate, nccl"),
    (("--only", "dp3"), "--only dp3 is not one of one, dp2_z1"),
    (("--only", "pp4_uneven"), "--only pp4_uneven is not one of one, dp2_z1"),
    (("--certify-dtype", "float32,float99"), "--certify-dtype float99 is not one of float32, bfloat16"),
    (("--baseline", "/nowhere"), "no checkout"),
    (("--rows-per-gpu", "0"), "--rows-per-gpu 0 is less than 1"),
    (("--warmup", "0"), "--warmup 0 is less than 1"),
    (("--steps", "-1"), "--steps -1 is less than 1"),
    (("--profiled-steps", "0"), "--profiled-steps 0 is less than 1"),
    (("--minutes", "nan"), "--minutes nan leaves no time"),
    (("--timeout", "inf"), "--timeout inf is no number of seconds"),
    (("--device", "cuda", "--gpus", "8"), "--gpus 8: "),
    (("--config", "configs/none.yaml", "--parts", "speed"), "configs/none.yaml"),
    ((*SPEED, "model.hiden_size=1"), "did you mean model.hidden_size"),
    (
        (*SPEED, "--only", "dp2_z1", "--rows-per-gpu", "3", "training.micro_batch_size=2"),
        "layout dp2_z1 of 3 rows a GPU: ",
    ),
    ((*SPEED, "--only", "tp2", "model.attention.num_query_groups=1"), "num_query_groups=1"),
    ((*SMALL, "--parts", "checkpoint", "model.ffn.num_moe_experts=3"), "num_moe_experts=3"),
    ((*SPEED, "data.path=nowhere"), "nowhere"),
    (("--parts", "certificate", "--certify-config", "configs/lstm_debug.yaml", "--only", "pp2"), "lstm_debug"),
    (("--parts", "nccl", "--out", "{text}"), "is no record of this benchmark"),
    (("--parts", "nccl", "--out", "{text}/found.json"), "cannot be written"),
)


def test_every_mistake_is_one_sentence_before_any_work(tmp_path):
    """In one process, which takes seconds to start."""
    text, out = tmp_path / "text", tmp_path / "found.json"
    text.write_text("no JSON\n")
    calls = [
        [
            "scale_out.py",
            "--gpus",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
            *(word.format(text=text) for word in flags),
        ]
        for flags, _ in MISTAKES
    ]
    code = (
        "import json, sys\n"
        "from benchmarks import scale_out\n"
        "for sys.argv in json.load(sys.stdin):\n"
        "    try:\n"
        "        scale_out.main()\n"
        "    except SystemExit as end:\n"
        "        print(f'ends with {end.code}', file=sys.stderr)\n"
    )
    command = [PYTHON, "-X", "utf8", "-c", code]
    found = subprocess.run(
        command,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    said = [line for line in found.stderr.splitlines() if line.startswith(("error: ", "ends with "))]
    assert found.returncode == 0 and len(said) == 2 * len(MISTAKES), found.stderr
    for (flags, words), error, end in zip(MISTAKES, said[::2], said[1::2], strict=True):
        assert words in error and end == "ends with 2", (flags, error, end)
    assert "Traceback" not in found.stderr and not out.exists()


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
