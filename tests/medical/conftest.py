import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lfm.medical.questions import open_questions
from tests.medical import sets


class Trained(NamedTuple):
    run: Path
    data: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """A run that learnt to answer made-up questions, of which some cannot be known; and these."""
    from data_pipeline.prepare import prepare
    from data_pipeline.prepare_config import PrepareConfig
    from lfm.training.loop import train
    from tests.training.tiny_run import tiny_run

    folder = tmp_path_factory.mktemp("medical")
    data = sets.labelled(folder / "questions")
    questions = open_questions([data]).parts["training"]
    sets.lines(folder / "lines.jsonl", [{"prompt": q.text, "completion": q.completion} for q in questions])
    tree = {
        "output": str(folder / "data"),
        "sources": [{"kind": "jsonl", "paths": [str(folder / "lines.jsonl")]}],
        "tokenizer": {"train_vocab_size": 300},
        "labels": "completion",
        "seq_length": 64,
        "packing": "best_fit",
        "validation_fraction": 0.05,
    }
    prepare(PrepareConfig.from_tree(tree, source="the trained fixture"))
    keys = ["name=answers", "training.steps=100", "training.global_batch_size=16", "training.micro_batch_size=16"]
    keys += ["checkpoint.every_steps=0", "validation.every_steps=0", "optimizer.lr=1e-2", "schedule.warmup_steps=10"]
    keys += ["model.vocab_size=300", "logging.every_steps=20", "samples.prompts=[]"]
    config = tiny_run(folder, folder / "data", *keys)
    train(config)
    return Trained(config.folder, data)


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs a command in this process: its exit code, and what it wrote to both streams."""

    def call(module, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lfm", *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return code, *capsys.readouterr()

    return call
