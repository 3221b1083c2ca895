"""Checkpoints that older versions wrote: they load, and go on as those versions went on.

`FAMILY/expected.txt` beside each is what the version that wrote it then did: two steps (loss, cross entropy, norm), the
digest chain, and a hash of every tensor of the last checkpoint; those of frozen ones are compared.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from lfm.checkpoint.manifest import FORMAT, read_manifest
from lfm.inference.load import open_model
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig
from tests.training.tiny_run import checkpoint_tensors

HERE = Path(__file__).parent
SAVED = [path.relative_to(HERE) for path in sorted(HERE.glob("format_*/*"))]


def test_there_are_checkpoints_of_every_older_format():
    assert {path.parts[0] for path in SAVED} == {f"format_{number}" for number in range(1, FORMAT)}


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_an_older_checkpoint_goes_on_as_its_version_did(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "data", tmp_path / "data")
    first = tmp_path / "runs" / saved.name / "checkpoints" / "step_00000002"
    shutil.copytree(HERE / saved / first.name, first)
    model, tokenizer, _ = open_model(first, device="cpu")
    assert model(torch.tensor([[1, 2, 3]]))[0].isfinite().all() and tokenizer.vocab_size == 320
    tree = read_manifest(first, warn=False)["config"]
    run = RunConfig.from_tree(tree, source=str(first))
    train(run)
    warnings = capsys.readouterr().err.count("manifest.json is of format 1, which has no checksum")
    assert warnings == (2 if saved.parts[0] == "format_1" else 0)
    lines = (HERE / saved / "expected.txt").read_text().splitlines()
    steps, chain, hashes = lines[:2], lines[2], dict(line.split() for line in lines[3:])
    tensors, manifest = checkpoint_tensors(run.folder / "checkpoints" / "step_00000004")
    assert manifest["format"] == FORMAT and manifest["progress"]["chain"] == chain
    records = {r["step"]: r for r in read_metrics(run.folder / "metrics.jsonl") if "cross_entropy" in r}
    for line in steps:
        step, *numbers = line.split()
        found = [records[int(step)][key] for key in ("loss", "cross_entropy", "grad_norm")]
        assert found == pytest.approx([float.fromhex(number) for number in numbers], rel=1e-5)
    assert tensors.keys() == hashes.keys()
    # Those versions rounded gradients elsewhere: what training moves differs in its last bits.
    for name, tensor in tensors.items():
        if name.startswith("frozen."):
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] == hashes[name], name
