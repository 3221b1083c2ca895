"""The wheel, outside the checkout: what is in it, and that it prepares, trains and generates from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [found] = folder.glob("*.whl")
    return found


def test_it_holds_all_packages_and_configs_and_nothing_of_the_checkout(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("lfm_training-")
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"lfm", "data_pipeline"}
    configs = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("lfm/configs/") for name in names if name.startswith("lfm/configs/")} == configs
    assert {"lfm/py.typed", "lfm/kernels/reservoir/cluster.cu"} <= set(names)
    [points] = [name for name in names if name.endswith("entry_points.txt")]
    assert "lfm = lfm.cli:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_it_prepares_trains_and_generates_from_an_empty_folder(wheel, tmp_path):
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def lfm(*arguments: str) -> str:
        command = [sys.executable, "-m", "lfm", *arguments]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in lfm("doctor")
    text = 'sources=[{kind: code, paths: ["{stdlib}/json/*.py"]}]'
    small = ("output=data/json", "tokenizer.train_vocab_size=300", "seq_length=64", "validation_fraction=0.3")
    lfm("prepare", "--config", "data/stdlib_8k", text, *small)
    sizes = ("model.vocab_size=300", "model.seq_length=64", "model.hidden_size=32", "model.num_layers=1")
    heads = ("model.attention.num_attention_heads=2", "model.attention.num_query_groups=1", "samples.prompts=[]")
    train = (
        "training.steps=3",
        "validation.max_rows=4",
        "--training.global_batch_size",
        "2",
        "training.micro_batch_size=2",
    )
    lfm("train", "--config", "lfm_debug", "data.path=data/json", *sizes, *heads, *train)
    assert (home / "runs/lfm_debug/checkpoints/step_00000003").is_dir()
    assert "bits per byte of text" in lfm("eval", "--checkpoint", "runs/lfm_debug")
    assert lfm("generate", "--checkpoint", "runs/lfm_debug", "--prompt", "def ", "--max-new-tokens", "3").startswith(
        "def "
    )
