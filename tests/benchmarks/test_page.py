"""What docs/performance.md shows of recorded results, and of none."""

import json

import pytest

from benchmarks.model import page
from benchmarks.model.parts import PARTS


def one(**parts):
    return {
        "tokens_per_second_per_gpu": 50_000.0,
        "range": [49_000.0, 51_000.0],
        "mfu_attended": 0.5,
        "step_ms": 1000.0,
        "expert_load_max_over_mean": [1.5, 1.7],
        "peak_memory_gib": [80.0, 81.0],
        "waterfall": {"parts": dict.fromkeys(PARTS, 0.0) | parts},
    }


@pytest.fixture
def results(tmp_path):
    row = {"layout": "DP2 EP2 Z1", "routing": "real", **one(experts=700.0, exchange=200.0, **{"host gaps": 100.0})}
    row["balanced"] = one(experts=900.0, **{"host gaps": 100.0})
    found = {
        "date": "2026-01-01",
        "runs": 1,
        "environment": {"gpus": 2, "gpu": "NVIDIA H200", "commit": "0123456789", "versions": {"torch": "2.11.0"}},
        "layouts": [row],
        # By code that had no waterfalls.
        "before": {"layouts": [{"layout": "DP2 EP2 Z1", "tokens_per_second_per_gpu": 40_000.0}]},
    }
    (tmp_path / "model_two.json").write_text(json.dumps(found))
    return page.recorded(tmp_path, "model")


def test_without_results_every_table_is_a_sentence(tmp_path):
    nothing = page.recorded(tmp_path, "model")
    said = {page.speeds(nothing), page.waterfalls(nothing, tmp_path / "x.png"), page.peers(nothing)}
    assert said | {page.collectives(nothing)} == {"Nothing is recorded."}
    page.plot(nothing, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_recorded_waterfalls_become_a_table_and_a_picture(results, tmp_path):
    picture = tmp_path / "waterfall.png"
    assert "![" not in page.waterfalls(results, picture)
    page.plot(results, picture)
    shown = page.waterfalls(results, picture)
    assert "| part | DP2 EP2 Z1, real | DP2 EP2 Z1, balanced |" in shown
    assert "| exchange | 200.0 ms, 20.0% | 0.0 ms, 0.0% |" in shown and "| bubble |" not in shown
    assert shown.endswith("(waterfall.png)") and picture.read_bytes().startswith(b"\x89PNG")


def test_speeds_show_both_routings_and_where_they_were_measured(results):
    shown = page.speeds(results)
    assert shown.count("| two | DP2 EP2 Z1 |") == 2
    assert "| 50.0% | 1,000 | 1.60 | 81.0 | 10.0% |" in shown and "2 NVIDIA H200, torch 2.11.0, commit 0123456" in shown


def test_small_families_and_what_stands_beside_them():
    speed = {"tokens_per_second": 2e6, "range": [1.9e6, 2.1e6], "step_milliseconds": 12.0, "busy_milliseconds": 11.5}
    bits = {"to_the_bit": True, "largest_difference": 0.0, "steps": 200}
    near = {"to_the_bit": False, "largest_difference": 2e-4, "plain_to_plain": 1e-4, "steps": 200}
    rows = [
        {
            "name": "a",
            "plain": speed,
            "replayed": speed | {"launches": 500.0},
            "parity": bits,
            "floor_tokens_per_second": 3e6,
        },
        {"name": "b", "plain": speed, "parity": near},
        {"name": "c", "failure": "it fell"},
        {"name": "llama", **speed},
    ]
    environment = {"gpus": 1, "gpu": "NVIDIA H200", "commit": "0123456789", "versions": {"torch": "2.11.0"}}
    found = page.small({"h200": {"rows": rows, "environment": environment, "runs": 1, "date": "2026-01-01"}})
    speeds = "| a | 2,000,000 | 2,000,000 (1,900,000 to 2,100,000) | 12.00, 11.50 | 500 |"
    assert f"{speeds} 200 steps equal to the bit | 3,000,000 |" in found
    assert "| b | 2,000,000 |  |  |  | 200 steps within 2e-04; of two runs kernel by kernel 1e-04 |  |" in found
    assert "| llama | as it is | 2,000,000" in found and "it fell" not in found
    assert page.small({}) == "Nothing is recorded."
