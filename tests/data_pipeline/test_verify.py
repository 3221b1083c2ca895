"""`verify` names every bad file, and every kind of damage; what a run makes of them is in tests/data."""

import json
import shutil
import sys

import pytest

from data_pipeline import verify
from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.report import REPORT_NAME
from lfm.files import json_checksum
from tests.data.corpus import make_data_set, texts, write_texts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One data set of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    found = {
        name: make_data_set(folder / name, compression=name if name == "zstd" else None) for name in ("raw", "zstd")
    }
    tree = {
        "output": str(folder / "bins"),
        "sources": [{"kind": "text", "paths": [str(write_texts(folder / "text", texts(200)))]}],
        "tokenizer": {"train_vocab_size": 320},
        "format": "bins",
        "validation_fraction": 0.2,
    }
    prepare(PrepareConfig.from_tree(tree, source="test"))
    return found | {"bins": folder / "bins"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def remove(path):
    path.unlink()


def said(monkeypatch, capsys, *words):
    """Exit code, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["verify", *map(str, words)])
    code = 0
    try:
        verify.main()
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("kind", ["raw", "zstd", "bins"])
def test_a_whole_data_set_is_whole(kind, whole, monkeypatch, capsys):
    for words in ([], ["--full"]):
        code, out, errors = said(monkeypatch, capsys, whole[kind], *words)
        assert (code, errors) == (0, []) and " bytes: " in out
    if kind != "bins":
        assert said(monkeypatch, capsys, f"file://{whole[kind]}", "--full")[0] == 0


@pytest.mark.parametrize("damage", [flip, cut, remove], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "kind, names",
    [
        ("raw", ["train/shard.00001.mds", "train/shard.00003.mds", "validation/shard.00000.mds"]),
        ("zstd", ["train/shard.00001.mds.zstd", "validation/shard.00000.mds.zstd"]),
        ("raw", ["train/index.json"]),
        ("raw", ["tokenizer.json"]),
        ("bins", ["train.bin", "val.bin"]),
        ("bins", ["bins.json"]),
    ],
)
def test_every_bad_file_is_named(kind, names, damage, whole, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(whole[kind], tmp_path / "data")
    for name in names:
        damage(folder / name)
    code, _, errors = said(monkeypatch, capsys, folder, "--full")
    assert code == 2
    for name in names:
        assert any(f"{folder}/{name}" in error or (name == "bins.json" and name in error) for error in errors), errors
    hidden = damage is flip and names[0].endswith((".mds", ".zstd", ".bin"))
    assert said(monkeypatch, capsys, folder)[0] == (0 if hidden else 2)


def test_shards_that_changed_places_are_both_named(whole, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(whole["raw"], tmp_path / "data")
    a, b = folder / "train/shard.00001.mds", folder / "train/shard.00002.mds"
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    code, _, errors = said(monkeypatch, capsys, folder, "--full")
    assert code == 2 and [path.name in error for path, error in zip((a, b), errors, strict=True)] == [True, True]


def test_a_folder_that_is_no_data_set_is_an_error(tmp_path, monkeypatch, capsys):
    assert said(monkeypatch, capsys, tmp_path / "nowhere")[0] == 2
    code, _, errors = said(monkeypatch, capsys, tmp_path)
    assert code == 2 and len(errors) == 3  # the tokenizer and two splits


@pytest.mark.parametrize(
    "changes",
    [{"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"files": [1]}, {"files": {"dropped.jsonl": 3}}, {"splits": []}],
)
def test_a_report_that_is_wrong_and_has_a_right_checksum_is_one_sentence(changes, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole["raw"], tmp_path / "data")
    path = tmp_path / "data" / REPORT_NAME
    report = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps(report | {"checksum": json_checksum(report)}))
    code, _, errors = said(monkeypatch, capsys, tmp_path / "data", "--full")
    assert code == 2 and len(errors) == 1 and "report.json is wrong: its files or splits" in errors[0], errors
