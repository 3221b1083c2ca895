"""Every file of a data set, and every kind of damage: what each of its readers makes of it.

A reader ends with one sentence that names the file, or what it gives is what it gave before; and at once.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline import audit, inspect, labelled
from data_pipeline.prepare import prepare
from data_pipeline.verify import Verification
from lfm.data import consumed
from lfm.data.format import TOKENIZER_NAME
from lfm.data.stream import DataConfig, open_tokenizer, open_training, open_validation
from lfm.errors import UserError
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE, config, texts, write_texts
from tests.data.damage import (
    cut,
    discard,
    empty,
    flip,
    forbid,
    limited,
    put_fifo,
    put_folder,
    put_loop,
    remove,
    without_privileges,
)

KINDS = {
    "raw": {"shard_bytes": 4096},
    "zstd": {"shard_bytes": 4096, "compression": "zstd"},
    "bins": {"format": "bins", "seq_length": None},
}
NAMES = {
    "raw": ["train/index.json", "train/shard.00001.mds", "validation/shard.00000.mds", "train", "validation"],
    "zstd": ["train/shard.00000.mds.zstd"],
    "bins": ["bins.json", "train.bin", "val.bin"],
}
COMMON = [TOKENIZER_NAME, "report.json", "dropped.jsonl", "validation.txt"]


def put_the_other_data_sets(path: Path) -> None:
    """The file of the same name, of a data set of other texts."""
    other = path.parents[1] / "other"
    kept = path.parent if not path.parent.joinpath(TOKENIZER_NAME).exists() else None
    source = other / path.name if kept is None else path.parents[2] / "other" / path.parent.name / path.name
    discard(path)
    shutil.copy(source, path)


DAMAGES = [flip, cut, empty, remove, put_folder, put_loop, put_fifo, forbid, put_the_other_data_sets]
CASES = [
    (kind, name, damage)
    for kind, names in NAMES.items()
    for name in [*names, *(COMMON if kind != "zstd" else [])]
    for damage in (DAMAGES if "." in name else [put_loop, put_fifo, forbid, discard])
]


def settings(kind, folder, output):
    return config(folder / "text", output, sources=[SOURCE | {"paths": [str(folder / "text")]}], **KINDS[kind])


SOURCE = {"kind": "text", "clean": {"min_chars": 4}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Data sets of each kind, `data` and `other`, of different texts."""
    folder = tmp_path_factory.mktemp("whole")
    for name, content in (("data", [*texts(90), "x"]), ("other", [*texts(120)[30:], "y"])):
        write_texts(folder / name / "text", content)
        for kind in KINDS:
            prepare(settings(kind, folder / name, folder / kind / name))
    return folder


def rows(data):
    """All that a run reads."""
    where = DataConfig(path=str(data), allow_smaller_tokenizer=True)
    reader = open_training(where, seq_length=SEQ_LENGTH, vocab_size=2 * VOCAB_SIZE, rows_per_step=1)
    held_out = open_validation(where, seq_length=SEQ_LENGTH, vocab_size=2 * VOCAB_SIZE)[""]
    tokenizer = open_tokenizer(where)
    ids = [each.read(range(len(each))).ids for each in (reader, held_out)]
    return torch.cat(ids).tolist(), tokenizer.sha256


def said(data, capsys):
    """By `inspect`, on the terminal and on its page."""
    capsys.readouterr()
    page = data.parent / "page.html"
    try:
        inspect.main([str(data), "--html", str(page)])
    except SystemExit:
        raise UserError(capsys.readouterr().err) from None
    return page.read_text()


def problems(data):
    found = Verification(str(data), full=True).run().problems
    if found:
        raise UserError("\n".join(found))


def outcome(read):
    """What a reader gives, or the sentence it ends with."""
    with limited(10):
        try:
            return read(), None
        except UserError as error:
            return None, str(error)


@pytest.mark.parametrize("kind, name, damage", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_damage_is_named_or_changes_nothing(kind, name, damage, whole, tmp_path, capsys):
    data, good_data = (Path(shutil.copytree(whole / kind / "data", tmp_path / each)) for each in ("data", "good"))
    shutil.copytree(whole / kind / "other", tmp_path / "other")
    good = {"run": rows(good_data), "inspect": said(good_data, capsys).replace("good", "data"), "verify": None}
    damage(data / name)
    with without_privileges():
        found = {
            "run": outcome(lambda: rows(data)),
            "inspect": outcome(lambda: said(data, capsys)),
            "verify": outcome(lambda: problems(data)),
            "prepare": outcome(lambda: prepare(settings(kind, whole / "data", data))["fingerprint"]),
        }
    # Of another data set's file, it may be those beside it that do not fit; and without a report, nothing is known.
    is_gone, is_other = damage is remove, damage is put_the_other_data_sets
    named = str(data) if is_other or (name == "report.json" and is_gone) else name
    for reader, (result, error) in found.items():
        if error is not None:
            assert named in error and "Traceback" not in error, (reader, error)
        elif reader != "prepare":
            assert result == good[reader], reader
    told = {reader for reader, (_, error) in found.items() if error is not None}
    beside = name in ("report.json", "dropped.jsonl", "validation.txt")
    assert ("verify" in told) == ((name, is_gone) != ("report.json", True))
    assert ("run" in told) == (not beside and (name, is_gone) != ("bins.json", True))  # files from elsewhere have none
    assert ("inspect" in told) == beside
    # Sizes are all that it looks at before it leaves a data set as it is.
    assert "prepare" in told or damage is flip or is_other or name == "dropped.jsonl"


@pytest.mark.parametrize("kind, name", [("raw", "train/index.json"), ("bins", "bins.json"), ("raw", "report.json")])
def test_no_flipped_bit_of_a_record_is_used(kind, name, whole, tmp_path, capsys):
    data = Path(shutil.copytree(whole / kind / "data", tmp_path / "data"))
    content = (data / name).read_bytes()
    for place in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        (data / name).write_bytes(changed)
        _, error = outcome(lambda: problems(data))
        try:
            same = json.loads(changed) == json.loads(content)  # blanks between its parts are no content
        except ValueError:
            same = False
        assert same or (error is not None and name in error), place
        assert error is None or not same


def test_splits_that_changed_places_are_told(whole, tmp_path, capsys):
    data = Path(shutil.copytree(whole / "raw" / "data", tmp_path / "data"))
    (data / "train").rename(data / "aside")
    (data / "validation").rename(data / "train")
    (data / "aside").rename(data / "validation")
    stream = {"name": "one", "path": str(data), "proportion": 1}
    for where in ({"path": str(data)}, {"path": None, "streams": [stream]}):
        with pytest.raises(UserError, match=r"train/index\.json is that of the validation split"):
            open_training(DataConfig(**where), seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=1)
    remote = DataConfig(path=str(tmp_path / "cache"), remote=str(data))
    with pytest.raises(UserError, match="validation split"):
        open_training(remote, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=1)
    for full in (False, True):
        found = Verification(str(data), full=full).run().problems
        assert len(found) == 2 and all("of the two splits back" in problem for problem in found)


def test_a_split_of_another_data_set_is_told_by_the_report(whole, tmp_path):
    data = Path(shutil.copytree(whole / "raw" / "data", tmp_path / "data"))
    tokenizer = {"tokenizer": {"file": str(data / TOKENIZER_NAME)}}
    prepare(config(whole / "other/text", tmp_path / "second", **tokenizer))
    shutil.rmtree(data / "validation")
    shutil.copytree(tmp_path / "second/validation", data / "validation")
    [problem] = [text for text in Verification(str(data), full=False).run().problems if "another data set" in text]
    assert str(data / "validation") in problem


@pytest.mark.parametrize("damage", [flip, cut, empty, put_folder, put_loop, put_fifo, forbid])
@pytest.mark.parametrize("name", ["index.json", "shard.00001.mds"])
def test_damage_to_a_cache_is_named_or_mended(name, damage, whole, tmp_path):
    where = DataConfig(path=str(tmp_path / "cache"), remote=str(whole / "raw/data"))

    def read():
        reader = open_training(where, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=1)
        return reader.read(range(len(reader))).ids.tolist()

    good = read()
    damage(tmp_path / "cache/train" / name)
    with without_privileges():
        result, error = outcome(read)
    assert result == good or name in error


@pytest.mark.parametrize("damage", [flip, cut, empty, remove, put_folder, put_loop, put_fifo, forbid])
def test_damage_to_the_inputs_of_audit_and_labelled_is_named(damage, tmp_path, capsys, monkeypatch):
    steps, chain = [], consumed.START
    for step in range(1, 6):
        chain = consumed.chained(chain, step, 7 * step)
        steps.append(f"{step} {7 * step:016x} {chain}\n")
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / consumed.CONSUMED_NAME).write_text("".join(steps))
    definitions = "".join(f"\nWord{i} \\Word\\, n. (Law)\n   A writ of the kind number {i}.\n" for i in range(60))
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress(definitions.encode()))
    flags = ["--config", "configs/data/medical_gcide.yaml", f"source.path={tmp_path}/gcide.dict.dz"]
    for path, main, words in (
        (tmp_path / "b" / consumed.CONSUMED_NAME, audit.main, [str(tmp_path / "a"), str(tmp_path / "b")]),
        (tmp_path / "gcide.dict.dz", labelled.main, [*flags, f"output={tmp_path}/labelled"]),
    ):
        damage(path)
        monkeypatch.setattr(sys, "argv", ["command", *words])
        if damage is cut and main is audit.main:  # as a crash leaves it
            main()
            assert "goes on to step 5" in capsys.readouterr().out
            continue
        with without_privileges(), limited(10), pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and path.name in error and error.count("\n") == 1, error
    assert not (tmp_path / "labelled").exists()
