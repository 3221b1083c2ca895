"""Steps of small families, timed both ways: what is told, and what is not."""

import json

import pytest
import torch

from benchmarks import floors, small
from lfm.errors import UserError
from lfm.training.run import RunConfig

CPU = torch.device("cpu")


def test_both_ways_agree_before_a_speed_is_told():
    row = small.measure("liquidnet_small_packed", CPU, 4)
    assert row["parity"]["to_the_bit"] and row["parity"]["holds"] and row["parity"]["steps"] == 4
    assert row["replayed"]["tokens_per_second"] > 0 and row["replayed"]["windows"] == 2


def test_no_speed_is_told_of_steps_that_differ(monkeypatch, capsys):
    engine_of = small.engine_of

    def other(run, device, mode):
        return engine_of(run.model_copy(update={"seed": 5}) if mode == "required" else run, device, mode)

    monkeypatch.setattr(small, "engine_of", other)
    row = small.measure("liquidnet_tiny", CPU, 3)
    assert not row["parity"]["holds"] and row["parity"]["plain_to_plain"] == 0 and "replayed" not in row
    small.summary([row])
    assert "| not told |" in capsys.readouterr().out


def test_a_preset_that_fails_loses_nothing(tmp_path, monkeypatch):
    def alone(name, flags, seconds):
        return {"name": name, "failure": "it fell"} if name == "laerc_owt" else {"name": name, "failure": "it too"}

    out = tmp_path / "small.json"
    monkeypatch.setattr(small, "alone", alone)
    for only in ("laerc_owt", "liquidlm,laerc_owt"):
        monkeypatch.setattr("sys.argv", ["small.py", "--device", "cpu", "--only", only, "--out", str(out)])
        small.main()
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["liquidlm", "laerc_owt"]


@pytest.mark.parametrize("config", ["liquidnet_small", "transformer_small", "laerc_owt"])
def test_floors_count_the_products_that_a_models_flops_are(config):
    run = RunConfig.load(f"configs/{config}.yaml")
    found = floors.kernels(run, torch.bfloat16)
    tokens = run.training.global_batch_size * run.model.seq_length
    assert sum(k.flops for k in found) == pytest.approx(run.model.flops_per_token() * tokens, rel=0.02)
    assert "tokens a step: at most" in floors.table(run, torch.bfloat16)


def test_other_families_are_not_counted():
    with pytest.raises(UserError, match=r"model\.kind=liquidlm is not counted"):
        floors.kernels(RunConfig.load("configs/liquidlm.yaml"), torch.bfloat16)
