"""What is no path, in every key and flag that takes one, is one sentence before anything is done."""

import sys
from functools import partial

import pytest

from data_pipeline import audit, inspect, labelled, prepare, verify
from data_pipeline.prepare_config import PrepareConfig
from launch import bench, chat, generate, plasticity, pretrain
from lfm.commands import export, import_weights
from lfm.errors import UserError
from lfm.files import expanded

PRETRAIN = ["--config", "configs/lfm_debug.yaml"]
PREPARE = ["--config", "configs/data/stdlib_8k.yaml"]
LABELLED = ["--config", "configs/data/medical_icd10.yaml"]
SHARDS = "{name: a, proportion: 1, path: 'PATH'}"
TAKERS = {
    "pretrain --config": (pretrain, ["--config", "PATH"]),
    "pretrain output": (pretrain, [*PRETRAIN, "output='PATH'"]),
    "pretrain data.path": (pretrain, [*PRETRAIN, "data.path='PATH'"]),
    "pretrain data.remote": (pretrain, [*PRETRAIN, "data.remote='PATH'"]),
    "pretrain data.streams": (pretrain, [*PRETRAIN, f"data.streams=[{SHARDS}]", "data.path=null"]),
    "pretrain checkpoint.resume": (pretrain, [*PRETRAIN, "checkpoint.resume='PATH'"]),
    "pretrain checkpoint.init_from": (pretrain, [*PRETRAIN, "checkpoint.init_from='PATH'"]),
    "prepare output": (prepare, [*PREPARE, "output='PATH'"]),
    "prepare paths": (prepare, [*PREPARE, "sources=[{kind: text, paths: ['PATH']}]"]),
    "prepare tokenizer.file": (prepare, [*PREPARE, "tokenizer={file: 'PATH'}"]),
    "prepare cache": (prepare, [*PREPARE, "sources=[{kind: debian, packages: [a], cache: 'PATH'}]"]),
    "prepare data_files": (prepare, [*PREPARE, "sources=[{kind: huggingface, path: json, data_files: ['PATH']}]"]),
    "labelled output": (labelled, [*LABELLED, "output='PATH'"]),
    "labelled source.path": (labelled, [*LABELLED, "source.path='PATH'"]),
    "labelled source.cache": (labelled, [*LABELLED, "source.cache='PATH'"]),
    "generate --checkpoint": (generate, ["--checkpoint", "PATH", "--prompt", "x"]),
    "chat --checkpoint": (chat, ["--checkpoint", "PATH"]),
    "chat --state": (chat, ["--checkpoint", "runs/none", "--state", "PATH"]),
    "plasticity --checkpoint": (plasticity, ["--checkpoint", "PATH"]),
    "plasticity --out": (plasticity, ["--checkpoint", "runs/none", "--out", "PATH"]),
    "export --checkpoint": (export, ["--checkpoint", "PATH", "--out", "runs/none"]),
    "export --out": (export, ["--checkpoint", "runs/none", "--out", "PATH"]),
    "import": (import_weights, ["PATH", "--out", "runs/none"]),
    "import --out": (import_weights, ["runs/none", "--out", "PATH"]),
    "bench --out": (bench, ["--op", "router", "--out", "PATH"]),
    "verify": (verify, ["PATH"]),
    "inspect": (inspect, ["PATH"]),
    "inspect --html": (inspect, [".", "--html", "PATH"]),
    "audit": (audit, ["PATH", "PATH"]),
}
NO_PATHS = {"~nobody-of-this-name/x": "~nobody", "x" * 5000: "(5,000 characters)", "LOOP": "loop", "a\0b": "a\\x00b"}


@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_path_is_one_sentence(taker, tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    module, words = TAKERS[taker]
    for path, named in NO_PATHS.items():
        text = path.replace("LOOP", str(tmp_path / "loop"))
        if "\0" in text and any("'PATH'" in word for word in words):
            text, end = "\\0".join(text.split("\0")), '"'  # as YAML writes it
            given = [word.replace("'PATH'", f"{end}{text}{end}") for word in words]
        else:
            given = [word.replace("PATH", text) for word in words]
        monkeypatch.setattr(sys, "argv", ["command", *given])
        with pytest.raises(SystemExit) as end:
            module.main()
        error = capsys.readouterr().err
        [sentence] = [line for line in error.splitlines() if "error: " in line]
        assert end.value.code == 2 and named in sentence and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_path_that_leads_nowhere_yet_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/new/folder") == tmp_path / "new/folder"
    for look in (partial(expanded, ""), partial(expanded, "a\0b")):
        with pytest.raises(UserError):
            look()


def test_help_says_of_a_path_that_it_is_text():
    lines = [line for line in PrepareConfig.describe().splitlines() if line.startswith("  output:")]
    assert lines == ["  output: str = (required)"]
