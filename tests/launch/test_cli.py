"""The command `lfm`: its words, what it says to a wrong one, keys as flags, configs by name, from anywhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfm.cli import WORDS
from lfm.config import parse_command_line, shipped_configs
from lfm.errors import UserError
from lfm.training.run import RunConfig

ROOT = Path(__file__).parents[2]


def test_help_names_every_word_and_imports_no_command():
    found = subprocess.run([sys.executable, "-m", "lfm", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and all(f"  {word} " in found.stdout for word in WORDS)
    code = "import sys; sys.argv = ['lfm', '--help']; from lfm.cli import main; main(); print(*sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(seen)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_says_what_it_takes(word, tmp_path, lfm):
    found = lfm(word, "--help", cwd=tmp_path)
    assert found.returncode == 0 and found.stdout.startswith(f"usage: lfm {word}"), found.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "lfm has no command 'trian'; did you mean train?"),
        (["qqq"], "lfm has no command 'qqq'; there are train, plan, prepare"),
        (["plan", "--config", "lfm_debg"], "config file lfm_debg does not exist; did you mean lfm_debug"),
        (
            ["plan", "--config", "lfm_debug", "--optimizer.lr"],
            "--optimizer.lr has no value; write --optimizer.lr VALUE",
        ),
        (["plan", "--config", "lfm_debug", "--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
        (["eval", "--checkpoint", "none"], "none"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, tmp_path, lfm):
    found = lfm(*arguments, cwd=tmp_path)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and words in found.stderr and found.stderr.count("\n") == 1


def test_keys_are_set_in_either_way_and_flags_stay_flags():
    words = [
        "--config",
        "lfm_debug",
        "--optimizer.lr",
        "1e-2",
        "--training.steps=7",
        "name=mine",
        "--folder",
        "--seed",
        "3",
    ]
    run, flags = parse_command_line(RunConfig, "a test", words, folder={"action": "store_true"})
    assert (run.optimizer.lr, run.training.steps, run.name, run.seed, flags.folder) == (1e-2, 7, "mine", 3, True)
    with pytest.raises(UserError, match="--seed has no value"):
        parse_command_line(RunConfig, "a test", ["--config", "lfm_debug", "--seed"])


@pytest.mark.parametrize("name", ["lfm_debug", "lfm_debug.yaml", "configs/lfm_debug.yaml", "configs/lfm_debug"])
def test_a_shipped_config_is_found_by_its_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunConfig.load(name) == RunConfig.load(shipped_configs() / "lfm_debug.yaml")
    (tmp_path / "lfm_debug").write_text(
        "base: [BASE]\nname: own\n".replace("BASE", str(ROOT / "configs/lfm_tiny.yaml"))
    )
    assert RunConfig.load("lfm_debug").name == "own", "a file of the user's comes first"


def test_doctor_and_completion_say_what_is_there(lfm):
    found = lfm("doctor")
    assert found.returncode == 0 and "torch" in found.stdout and "GiB are free" in found.stdout
    bash = lfm("completion", "bash")
    assert all(word in bash.stdout for word in WORDS)
    assert subprocess.run(["bash", "-n"], input=bash.stdout, text=True).returncode == 0


def test_eval_gives_what_validation_of_the_run_gave(tmp_path, text_data, lfm):
    from lfm.training.loop import train
    from lfm.training.metrics_file import read_metrics
    from tests.training.tiny_run import tiny_run

    text_data = shutil.copytree(text_data, tmp_path / "data")
    run = tiny_run(tmp_path, text_data, "training.steps=2", "validation.max_rows=1000", "validation.every_steps=2")
    train(run)
    (validated,) = [r for r in read_metrics(run.folder / "metrics.jsonl") if "validation_loss" in r]
    found = lfm("eval", "--checkpoint", run.folder, "--device", "cpu")
    assert found.returncode == 0, found.stderr
    assert (
        f"loss {validated['validation_loss']:.4f} nats over {validated['validation_labels']:,} labels" in found.stdout
    )
    index = json.loads((text_data / "validation/index.json").read_text())
    assert f"of {index['lfm']['num_rows']:,} rows" in found.stdout and "bits per byte of text" in found.stdout
    part = lfm("eval", "--checkpoint", run.folder, "--data", text_data, "--split", "train", "--max-rows", 3)
    assert "train split" in part.stdout and ", 3 of " in part.stdout and "bits per byte" not in part.stdout

    # Made anew, of as many ids, which mean something else; then as the sentence says.
    text = shutil.copy(ROOT / "README.md", tmp_path / "book.md")
    keys = [f"output={text_data}", "tokenizer={train_vocab_size: 512}", "seq_length=64", "overwrite=true"]
    assert lfm("prepare", text, *keys).returncode == 0
    found = lfm("eval", "--checkpoint", run.folder)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert f"{text_data}/tokenizer.json is another tokenizer than the model's, {run.folder}/" in found.stderr
    way_out = re.search(r"tokenizer\.file=\S+ seq_length=64", found.stderr)
    assert way_out is not None
    keys = [f"output={tmp_path}/same", *way_out[0].split()]
    assert lfm("prepare", text, *keys[:2], "seq_length=32").returncode == 0
    found = lfm("eval", "--checkpoint", run.folder, "--data", tmp_path / "same")
    assert found.returncode == 2 and "has rows of 32 ids and the model reads rows of 64; name data" in found.stderr
    assert lfm("prepare", text, *keys, "overwrite=true").returncode == 0
    found = lfm("eval", "--checkpoint", run.folder, "--data", tmp_path / "same")
    assert found.returncode == 0 and "bits per byte of text" in found.stdout, found.stderr
