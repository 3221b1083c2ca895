"""The peers that train, on CPUs, where their speeds mean nothing."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from benchmarks.model.measure import rows_of
from lfm.training.start import local_engine
from tests.training.tiny_run import PYTHON, ROOT, tiny_overrides, tiny_run

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed, and no dependency"
)


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT)


def peer(name, tmp_path, *keys, start=(PYTHON,)):
    out = tmp_path / "found.json"
    short = ["--config", "configs/lfm_debug.yaml", "--warmup", 1, "--steps", 2, "--out", out]
    found = run(*start, ROOT / f"benchmarks/peers/{name}.py", *short, *keys)
    return found, json.loads(out.read_text())["peers"][0] if out.exists() else None


@pytest.mark.slow
@needs_transformers
def test_transformers_trains_a_model_of_the_same_shape(tmp_path, text_data):
    found, row = peer("hugging_face", tmp_path, *tiny_overrides(tmp_path / "runs", text_data))
    assert found.returncode == 0, found.stderr[-2000:]
    counts = tiny_run(tmp_path, text_data, "model.liquid=null").model.count_parameters()
    assert row["parameters"] == counts.total  # attention, experts, norms and vocabulary: all but reservoirs
    assert row["tokens_per_step"] == 4 * 64 and row["steps_measured"] == 2
    assert all(4 < loss < 8 for loss in row["losses"])  # 6.2 is what equal chances of 512 ids give
    assert "speeds mean nothing" in found.stdout


@needs_transformers
def test_a_model_of_another_kind_has_no_such_peer(tmp_path):
    found = run(PYTHON, "benchmarks/peers/hugging_face.py", "--config", "configs/lstm_debug.yaml", "--random-ids")
    assert found.returncode == 2 and "the shape of an LFM" in found.stderr


@pytest.mark.slow
def test_fsdp_trains_our_model_to_our_losses(tmp_path, text_data):
    """Two processes, in fp32, against one of ours: the same rows, initial weights and terms."""
    keys = tiny_overrides(tmp_path / "runs", text_data)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    keys += ["training.micro_batch_size=1"]
    found, row = peer("fsdp", tmp_path, *keys, start=torchrun)
    assert found.returncode == 0, found.stderr[-3000:]
    config = tiny_run(tmp_path, text_data, "training.micro_batch_size=1")
    engine = local_engine(config, torch.device("cpu"))
    stream = rows_of(config, slice(0, 4), random_ids=False)
    want = [engine.forward_backward(stream.next()).loss for _ in range(2)]
    assert row["gpus"] == 2 and row["losses"][0] == pytest.approx(want[0], rel=1e-5)
    assert row["losses"][1] == pytest.approx(want[1], rel=1e-3)  # behind a step of a rate of 1e-5
