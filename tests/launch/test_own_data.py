"""`lfm train --data DIR`: what is chosen, that it is gone on with, every family; `lfm init`; and their mistakes."""

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lfm.cli import WORDS
from lfm.commands.own_data import PRESETS, Wish, own_run
from lfm.commands.pretrain import wish_of
from lfm.config import shipped_configs
from lfm.errors import UserError
from lfm.models.registry import FAMILIES
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

SMALL = ["model.hidden_size=32", "model.num_layers=2", "logging.tensorboard=false"]


def wish(data, *overrides, family="liquidnet", minutes=0.5):
    return Wish(str(data), family, minutes, (*overrides, *(SMALL if family in ("liquidnet", "lstm") else SMALL[2:])))


def test_every_family_has_presets_from_small_to_large_and_all_are_shipped():
    assert PRESETS.keys() == {config.model_fields["kind"].default for config in FAMILIES}
    for family, names in PRESETS.items():
        runs = [RunConfig.load(shipped_configs() / f"{name}.yaml") for name in names]
        assert {run.model.kind for run in runs} == {family}
        flops = [run.model.flops_per_token() for run in runs]
        assert flops == sorted(flops)


@pytest.fixture(scope="module")
def short_rows(tmp_path_factory):
    """Some two thousand bytes of text, in rows of 16."""
    from data_pipeline.own_text import own_text
    from data_pipeline.prepare import prepare

    folder = tmp_path_factory.mktemp("own")
    (folder / "a.txt").write_bytes(Path(os.__file__).read_bytes()[:2000])
    prepare(own_text([str(folder / "a.txt"), f"output={folder}/data"], spool=folder).config)
    return folder / "data"


@pytest.mark.parametrize("family", PRESETS)
def test_a_run_of_every_family_fits_the_data(family, short_rows, text_data, tmp_path):
    for data, seq_length in [(short_rows, 16), (text_data, 64)]:
        asked = wish(data, f"output={tmp_path}/runs", family=family, minutes=1e6)
        run, _ = own_run(asked, started=time.monotonic(), measure=False)
        assert run.model.seq_length == seq_length and run.model.kind == family and run.name == f"data_{family}"
    run, lines = own_run(wish(short_rows, f"output={tmp_path}", family=family), started=time.monotonic())
    assert run.training.steps >= 10 and run.data.path == str(short_rows)
    assert lines[0].startswith(f"preset: {family}_debug, ") and lines[-1].startswith(f"steps: {run.training.steps:,}, ")
    assert not (tmp_path / run.name).exists(), "choosing writes nothing"


def test_data_of_names_in_any_letters_have_runs_of_their_own(short_rows, tmp_path):
    names = {}
    for folder in ("a/стихи", "a/проза", "b/проза", "a/詩 poem"):
        shutil.copytree(short_rows, tmp_path / folder)
        names[folder] = own_run(wish(tmp_path / folder), started=0.0, measure=False)[0].name
    assert len(set(names.values())) == 4
    assert all(re.fullmatch(r"(run|poem)_[0-9a-f]{6}_liquidnet", name) for name in names.values()), names


def test_time_or_text_decides(short_rows, text_data, tmp_path):
    by_time, lines = own_run(wish(text_data, f"output={tmp_path}", minutes=0.1), started=time.monotonic())
    assert lines[-1].endswith("what fits into 90% of 0.1 minutes, set-up and validation counted")
    by_text, lines = own_run(wish(short_rows, f"output={tmp_path}", minutes=0.3), started=time.monotonic())
    assert re.search(r"5 readings would be \d\d steps, in which a model learns little; 200 are the fewest", lines[-1])
    assert by_text.training.steps == 200, "five readings of a text so short would be fewer"
    for run in (by_time, by_text):
        assert run.schedule.warmup_fraction == 0.02 and run.validation.every_steps == run.training.steps // 8
    asked, lines = own_run(wish(short_rows, f"output={tmp_path}", "training.steps=30"), started=time.monotonic())
    assert asked.training.steps == 30 and lines[-1].endswith("readings of the text: as training.steps says")
    with pytest.raises(
        UserError, match=r"--minutes 0\.1 is too short: \d+ s have passed and a step of liquidnet_debug"
    ):
        own_run(wish(text_data, f"output={tmp_path}", minutes=0.1), started=time.monotonic() - 3600)


def test_a_stopped_run_goes_on_by_the_same_command_and_chooses_nothing_anew(short_rows, tmp_path, monkeypatch, lfm):
    command = ["train", "--data", short_rows, "--minutes", "0.3", f"output={tmp_path}/runs", *SMALL]
    command.append("training.steps=40")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    full = [sys.executable, "-m", "lfm", *map(str, command)]
    first = subprocess.Popen(full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdout is not None
    said = []
    for line in first.stdout:
        said.append(line)
        if line.startswith("step "):
            first.send_signal(signal.SIGTERM)
            break
    said += first.stdout.readlines()
    assert first.wait(60) == 0 and "the same command goes on" in "".join(said), said
    assert "next: lfm chat" not in "".join(said)
    folder = tmp_path / "runs/data_liquidnet"
    chosen = (folder / "chosen.yaml").read_text()
    assert chosen.startswith(f"# lfm train --data {short_rows} --family liquidnet --minutes 0.3\n")
    with pytest.raises(UserError, match="repeat that to go on, or give another name=NAME"):
        own_run(wish(short_rows, f"output={tmp_path}/runs", minutes=7), started=time.monotonic())
    monkeypatch.chdir(short_rows.parent)
    for same in (f"{short_rows}/", "data", "./data/"):
        again, lines = own_run(wish(same, f"output={tmp_path}/runs", minutes=0.3), started=time.monotonic())
        assert again.folder == folder and lines[0].startswith("going on with what was chosen before")
    with pytest.raises(UserError, match="is a run of another command; give another name=NAME"):
        (tmp_path / "runs/other/checkpoints").mkdir(parents=True)
        own_run(wish(short_rows, f"output={tmp_path}/runs", "name=other"), started=time.monotonic())

    second = lfm(*command)
    assert second.returncode == 0, second.stderr
    assert "going on with what was chosen before" in second.stdout and "resuming from" in second.stdout
    assert (folder / "chosen.yaml").read_text() == chosen
    assert "bits per byte of text (unigram entropy" in second.stdout
    assert (
        second.stdout.endswith(f"run folder: {folder}\nnext: lfm chat --checkpoint {folder}\n")
        or "/step_" in second.stdout
    )

    # Measuring leaves no trace: the same config from its file is the same run.
    train(RunConfig.load(folder / "chosen.yaml", ["name=plain"]))
    losses = [
        {r["step"]: r["loss"] for r in read_metrics(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in r}
        for name in ("data_liquidnet", "plain")
    ]
    assert losses[0] == losses[1]


def called(monkeypatch, capsys, word, *arguments):
    """Exit code and streams of a command, in this process."""
    entry = WORDS[word]
    monkeypatch.setattr(sys, "argv", [f"lfm {word}", *entry.before, *map(str, arguments)])
    code = 0
    try:
        importlib.import_module(entry.module).main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_folder_and_dry_run_train_nothing(short_rows, tmp_path, monkeypatch, capsys):
    data = ("--data", short_rows, f"output={tmp_path}/runs")
    assert called(monkeypatch, capsys, "train", *data, "--folder", "name=mine") == (0, f"{tmp_path}/runs/mine\n", "")
    code, out, error = called(monkeypatch, capsys, "plan", *data, "--family", "lstm", "--minutes", "0.3", *SMALL)
    assert code == 0 and "preset: lstm_debug" in out and "resolved config:" in out, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train"], "there is nothing to train; give --config FILE, or a data set by --data DIR"),
        (["train", "--minutes", "5"], "there is nothing to train"),
        (["train", "--data", "none"], "data.path=none does not exist; make it with `lfm prepare FILE output=none`"),
        (["train", "--data", "DATA", "--family", "liquidnt"], "--family liquidnt is none; did you mean liquidnet?"),
        (["train", "--data", "DATA", "--family", "zzz"], "--family zzz is none; there are liquidnet, lfm"),
        (["train", "--data", "DATA", "--minutes", "0"], "--minutes 0 is no time to train for"),
        (["train", "--data", "DATA", "--minutes", "nan"], "--minutes nan is no time to train for"),
        (["train", "--data", "DATA", "--config", "lfm_debug"], "are for a run without --config"),
        (["train", "--data", "DATA", "optimizer.lrr=1", "--folder"], "did you mean optimizer.lr?"),
        (["init", "there.yaml"], "there.yaml exists and is not overwritten"),
        (["init", "mine.txt"], "mine.txt should end in .yaml"),
        (["init", "mine.yaml", "--family", "lsm"], "--family lsm is none; did you mean lstm?"),
        (["init", "there.yaml/mine.yaml"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, words, text_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("name: mine\n")
    code, out, error = called(monkeypatch, capsys, *(text_data if word == "DATA" else word for word in arguments))
    assert code == 2 and out == "", out
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "name: mine\n"


def test_several_processes_are_refused(monkeypatch):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    flags = argparse.Namespace(data="data", family=None, minutes=None, overrides=[])
    with pytest.raises(UserError, match="--data chooses for one process and there are 2; give them a --config"):
        wish_of(flags)


@pytest.mark.parametrize("family", PRESETS)
def test_init_writes_a_commented_config_that_is_its_preset(family, tmp_path, monkeypatch):
    from lfm.commands.init import commented

    path = tmp_path / "mine.yaml"
    path.write_text(commented("mine", PRESETS[family][0]))
    wanted = RunConfig.load(PRESETS[family][0], ["name=mine"])
    assert RunConfig.load(path) == wanted
    text = path.read_text()
    assert "# Optimizer steps of the whole run.\n  steps: " in text and max(map(len, text.splitlines())) < 300


def test_init_and_its_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = called(monkeypatch, capsys, "init", "my run.yaml", "--family", "lstm")
    assert (code, out) == (0, "my run.yaml is written; next: lfm train --config 'my run.yaml'\n")
    code, out, error = called(monkeypatch, capsys, "plan", "--config", "my run.yaml")
    assert code == 0 and "name: my_run" in out, error
