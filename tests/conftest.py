import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Tensors here are tiny: threads would wait for each other longer than they compute.  Subprocesses inherit it, so that
# their results have the same bits.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would every program that the tests start and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports triton


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic():
    """Fixed seed; `torch.empty` is filled with NaN, so code that forgets to write is caught."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lfm(monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess]:
    """`lfm WORD ...` in this process, which has paid for its imports: exit code, stdout and stderr, as of a process.

    `lines`: what it reads from the standard input.
    """
    from lfm.cli import main

    def call(*arguments: object, cwd: Path | None = None, lines: bytes = b"") -> subprocess.CompletedProcess:
        words, code = ["lfm", *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        capfd.readouterr()
        with contextlib.chdir(cwd or os.getcwd()):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> Path:
    """A data set of real text: two packages of the standard library, 512 ids, rows of 64."""
    from data_pipeline.prepare import prepare
    from data_pipeline.prepare_config import PrepareConfig

    folder = tmp_path_factory.mktemp("text") / "data"
    tree = {
        "output": str(folder),
        "sources": [{"kind": "code", "paths": ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}],
        "tokenizer": {"train_vocab_size": 512},
        "seq_length": 64,
        "validation_fraction": 0.2,
    }
    prepare(PrepareConfig.from_tree(tree, source="the text_data fixture"))
    return folder
