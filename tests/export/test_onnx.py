"""`lfm export --format onnx`: two graphs in onnxruntime that compute what the checkpoint does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from lfm.commands import export
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.export import formats, onnx_graphs
from lfm.export.onnx_graphs import Runner
from lfm.export.source import Source
from tests.export.checkpoints import TREES, VARIANTS, checkpoint_of

OTHERS = {
    "transformer_whole_heads": TREES["transformer"] | {"attention": {"num_attention_heads": 4, "num_query_groups": 4}},
    "liquidnn_batch_mean": TREES["liquidnn"] | {"trace_mode": "batch_mean", "plastic_from": 0.0},
    "liquidnn_adaptive": TREES["liquidnn"] | {"adaptive_steps": True, "plastic_from": 0.0},
}
QUICK = ("liquidnet",)
SLOW = [name for name in TREES | VARIANTS | OTHERS if name not in QUICK]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["to be, or not to be: that is the question. " * 15, "def f(x):\n"], 512, allow_smaller=True)


@pytest.fixture
def run(tokenizer, tmp_path):
    return lambda name: checkpoint_of((TREES | VARIANTS | OTHERS)[name], tokenizer, tmp_path / name)


@pytest.fixture
def lfm(monkeypatch, capsys):
    """`lfm export --format onnx ...` here: exit code, and what it printed or complained of."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lfm export", "--format", "onnx", *map(str, arguments)])
        try:
            export.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.err if code else said.out

    return command


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_graphs_compute_what_the_checkpoint_does(name, run, lfm, tmp_path):
    out = tmp_path / "onnx"
    code, said = lfm("--checkpoint", run(name), "--out", out)
    assert code == 0 and "400 of 400 greedy tokens are alike" in said, said
    assert names(out) == ["config.json", "prefill.onnx", "step.onnx", "tokenizer.json", "weights.bin"]
    assert json.loads((out / "config.json").read_text())["model"]["kind"] == (TREES | VARIANTS | OTHERS)[name]["kind"]
    for graph in onnx_graphs.GRAPHS:
        assert str(Path(__file__).parents[2]).encode() not in (out / f"{graph}.onnx").read_bytes()

    # Other batches and lengths than those of the trace and of the comparison: one token, and a state behind it.
    prefill, step = (Runner(out / f"{graph}.onnx") for graph in onnx_graphs.GRAPHS)
    ids = torch.randint(0, 512, (4, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = Source(tmp_path / name).model(torch.float32)(ids)[0]
    state, found = prefill.empty_state(4), []
    for graph, columns in ((prefill, 1), (prefill, 20), (step, 1), (prefill, 1)):
        logits, state = graph(ids[:, :columns], state)
        ids = ids[:, columns:]
        found.append(logits)
    assert (torch.cat(found, 1) - want).abs().max() < 1e-5


def test_weights_are_stored_once_for_both_graphs_and_others_are_noticed(run, tmp_path):
    source, out = Source(run("liquidnet")), tmp_path / "onnx"
    out.mkdir()
    onnx_graphs.write(source, out, formats.Settings())
    weights = np.fromfile(out / "weights.bin", dtype=np.float32)
    assert weights.size < 1.1 * sum(tensor.numel() for tensor in source.model(torch.float32).parameters())
    (weights * 1.01).tofile(out / "weights.bin")
    with pytest.raises(RuntimeError, match="compute something else"):
        list(onnx_graphs.compare(source, out, formats.Settings()))


def test_what_has_no_graphs_is_one_sentence(run, lfm, tmp_path, monkeypatch):
    path, before = run("lstm"), names(tmp_path)

    def refused(sentence: str, *flags: object) -> None:
        code, said = lfm("--checkpoint", path, "--out", tmp_path / "onnx", *flags)
        assert code == 2 and sentence in said and said.count("\n") == 1, said
        assert names(tmp_path) == before

    refused("--format onnx is float32 alone, not bfloat16; leave --dtype out", "--dtype", "bf16")
    refused("--push-to-hub is for --format hf", "--push-to-hub", "a/b")
    monkeypatch.delitem(onnx_graphs.CLASSES, "lstm")
    refused("is of kind lstm, which has no ONNX graphs (kinds: lfm, ")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_sentence(package, run, lfm, tmp_path, monkeypatch):
    path = run("lstm")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    code, said = lfm("--checkpoint", path, "--out", tmp_path / "onnx")
    sentence = f"--format onnx needs the package {package}; install it with `pip install 'lfm-training[onnx]'`"
    assert code == 2 and sentence in said and names(tmp_path) == ["lstm"], said
