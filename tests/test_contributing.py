"""What docs/contributing.md says that additions touch is enough: a toy family, loss term and optimizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.training.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
TOYS = ROOT / "tests/toys"
TOUCHES = {
    "a family": ["lfm/models/X.py", "a line of `lfm/models/registry.py`", "configs/"],
    "a loss term of a layer": ["`terms`", "the layer's forward"],
    "an optimizer": ["lfm/training/optimizer/KIND.py", "lfm/training/optimizer/registry.py"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code: a family is two new files and a line of registry, an optimizer a file and two lines."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("lfm", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOYS / "model.py", folder / "lfm/models/toy.py")
    shutil.copy(TOYS / "toy.yaml", folder / "configs/toy.yaml")
    add(folder / "lfm/models/registry.py", '    "lfm": "LFM",\n', '    "toy": "Toy",\n')
    shutil.copy(TOYS / "optimizer.py", folder / "lfm/training/optimizer/toy.py")
    registry = folder / "lfm/training/optimizer/registry.py"
    known = "from lfm.training.optimizer.lion import LionConfig\n"
    add(registry, known, "from lfm.training.optimizer.toy import ToyOptimizerConfig\n")
    add(registry, "AdamWConfig | LionConfig", " | ToyOptimizerConfig")
    shutil.copytree(ROOT / "tests/golden/data", folder / "data")
    return folder


def add(file: Path, behind: str, text: str) -> None:
    before, found, after = file.read_text(encoding="utf-8").partition(behind)
    assert found, behind
    file.write_text(before + behind + text + after, encoding="utf-8")


def losses(tree, *command: str) -> list[tuple[float, float, float]]:
    """Cross entropy, the toy's own term and the gradient's norm by step, of a run of the copy."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    keys = ["--config", "configs/toy.yaml", "data.path=data"]
    done = subprocess.run(
        [sys.executable, *command[:-1], "launch/pretrain.py", *keys, *command[-1].split()],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    name = next(key.removeprefix("name=") for key in command[-1].split() if key.startswith("name="))
    records = [r for r in read_metrics(tree / "runs" / name / "metrics.jsonl") if "cross_entropy" in r]
    return [(r["cross_entropy"], r["activity"], r["grad_norm"]) for r in records]


def test_the_table_names_the_files_that_the_toys_took():
    rows = [
        line
        for line in (ROOT / "docs/contributing.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    for adding, files in TOUCHES.items():
        [row] = [row for row in rows if row.startswith(f"| {adding} |")]
        assert all(file in row for file in files), row


def test_a_toy_family_with_a_loss_term_and_a_toy_optimizer_train_alike_on_one_process_and_on_two(tree):
    alone = losses(tree, "name=alone")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    together = losses(tree, *torchrun, "name=together parallel.zero_stage=1")
    assert len(alone) == 3 and alone[2][0] < alone[0][0]
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
