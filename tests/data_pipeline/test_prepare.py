import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline.prepare import main, prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.format import SPLITS, read_index
from lfm.data.reader import ShardReader
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from tests.data.corpus import SEQ_LENGTH, config, texts, write_texts


def stored_texts(data_set: Path, split: str) -> list[str]:
    """The documents of a split, read back from its rows."""
    tokenizer = Tokenizer.from_file(data_set / "tokenizer.json")
    reader = ShardReader(data_set / split)
    ids = reader.read(range(len(reader))).ids.flatten().tolist()
    ids = ids[: len(ids) - reader.index.num_padding]
    documents, start = [], 0
    for end, token in enumerate(ids):
        if token == tokenizer.eod_id:
            documents.append(tokenizer.decode(ids[start:end]))
            start = end + 1
    assert start == len(ids)
    return documents


def contents(data_set: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data_set)): path.read_bytes() for path in data_set.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_all_text_comes_back_from_the_shards(compression, tmp_path):
    originals = [*texts(80), "word " * 2000]  # the last fills many rows
    prepare(config(write_texts(tmp_path / "text", originals), tmp_path / "data", compression=compression))
    stored = {split: stored_texts(tmp_path / "data", split) for split in SPLITS}
    assert sorted(stored["train"] + stored["validation"]) == sorted(originals)
    assert (tmp_path / "data" / "validation.txt").read_bytes() == "".join(stored["validation"]).encode()
    for split in SPLITS:
        index, _ = read_index(tmp_path / "data" / split)
        assert index.num_documents == len(stored[split])
        assert index.text_bytes == sum(len(text.encode()) for text in stored[split])
        assert index.num_tokens + index.num_padding == index.num_rows * SEQ_LENGTH


def test_duplicates_are_dropped_before_the_split_so_none_crosses_it(tmp_path):
    originals = texts(60)
    report = prepare(config(write_texts(tmp_path / "text", originals * 3), tmp_path / "data"))
    stored = {split: stored_texts(tmp_path / "data", split) for split in SPLITS}
    assert sorted(stored["train"] + stored["validation"]) == sorted(originals)
    assert not set(stored["train"]) & set(stored["validation"])
    assert report["stages"]["dedup"]["duplicates"] == 120


def test_report_adds_up_and_is_stored(tmp_path):
    source = write_texts(tmp_path / "text", [*texts(50), texts(1)[0], "  "])
    (source / "latin1.txt").write_bytes(b"\xe9")
    report = prepare(config(source, tmp_path / "data", max_bytes=5000))
    assert report == json.loads((tmp_path / "data" / "report.json").read_bytes())
    sources, dedup, limit = (report["stages"][name] for name in ("sources", "dedup", "limit"))
    assert sources["files_found"] == 53
    assert sources["files_found"] == sources["files_read"] + sources["files_not_utf8"]
    assert limit["over_limit"] > 0
    assert limit["bytes"] <= 5000 < limit["bytes"] + 1000
    assert sources["documents"] == dedup["documents"] + dedup["duplicates"]
    assert dedup["documents"] == limit["documents"] + limit["over_limit"]
    assert limit["documents"] == sum(report["splits"][split]["num_documents"] for split in SPLITS)
    assert limit["bytes"] == sum(report["splits"][split]["text_bytes"] for split in SPLITS)


def test_vocabulary_is_exactly_the_requested_one(raw_data_set):
    assert Tokenizer.from_file(raw_data_set / "tokenizer.json").vocab_size == 320
    assert read_index(raw_data_set / "train")[0].vocab_size == 320


def test_tokenizer_can_be_a_file_and_a_large_one_is_stored_as_uint32(tmp_path):
    small = json.loads(train_bpe(texts(50), 300).definition)
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    small["added_tokens"] += [{"id": 300 + i, "content": f"<|unused {i}|>", **special} for i in range(65536)]
    (tmp_path / "large.json").write_text(json.dumps(small))
    source = write_texts(tmp_path / "text", texts(30))
    prepare(config(source, tmp_path / "data", tokenizer={"file": str(tmp_path / "large.json")}))
    index, _ = read_index(tmp_path / "data" / "train")
    assert (index.vocab_size, index.dtype) == (65836, "uint32")
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (tmp_path / "large.json").read_bytes()
    assert sorted(stored_texts(tmp_path / "data", "train") + stored_texts(tmp_path / "data", "validation")) == sorted(
        texts(30)
    )


def test_second_run_finds_the_first_ones_result(tmp_path, capsys):
    source = write_texts(tmp_path / "text", texts(60))
    first = prepare(config(source, tmp_path / "data"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    capsys.readouterr()
    assert prepare(config(source, tmp_path / "data")) == first
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == times


def test_other_config_or_changed_inputs_are_an_error_unless_overwriting(tmp_path):
    source = write_texts(tmp_path / "text", texts(60))
    prepare(config(source, tmp_path / "data"))
    with pytest.raises(UserError, match="choose another output, or set overwrite=true"):
        prepare(config(source, tmp_path / "data", seed=1))
    (source / "new.txt").write_text("new text")
    with pytest.raises(UserError, match="inputs that have changed since"):
        prepare(config(source, tmp_path / "data"))
    report = prepare(config(source, tmp_path / "data", overwrite=True))
    assert report["stages"]["sources"]["documents"] == 61
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data", "text"]


def test_overwrite_repairs_a_damaged_data_set_of_the_same_config(tmp_path):
    source = write_texts(tmp_path / "text", texts(60))
    prepare(config(source, tmp_path / "data"))
    whole = contents(tmp_path / "data")
    (tmp_path / "data" / "train" / "shard.00000.mds").unlink()
    prepare(config(source, tmp_path / "data", overwrite=True))
    assert contents(tmp_path / "data") == whole


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
    source = write_texts(tmp_path / "text", texts(60))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is no data set of this program; choose another output"):
            prepare(config(source, source, overwrite=overwrite))
    assert len(list(source.iterdir())) == 60


def test_run_killed_twice_leaves_no_data_set_and_the_third_equals_an_uninterrupted_one(tmp_path):
    source = write_texts(tmp_path / "text", texts(800, words=400))
    changes = {"tokenizer": {"train_vocab_size": 600}}
    run = config(source, tmp_path / "data", **changes)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    partial = tmp_path / ".data.partial"
    for sign in (partial, partial / "train" / "shard.00020.mds"):  # training the tokenizer; writing shards
        process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.prepare", "--config", str(tmp_path / "run.yaml")],
            stdout=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + 60
        while not sign.exists() and time.monotonic() < give_up:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert partial.exists() and not (tmp_path / "data").exists()

    prepare(run)
    assert not partial.exists()
    prepare(config(source, tmp_path / "uninterrupted", **changes))
    assert contents(tmp_path / "data") == contents(tmp_path / "uninterrupted")


def test_two_runs_on_one_output_at_once_are_an_error(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    source = write_texts(tmp_path / "text", texts(60))
    with open(tmp_path / ".data.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(config(source, tmp_path / "data"))
    prepare(config(source, tmp_path / "data"))


def test_a_split_left_empty_is_an_error_and_leaves_nothing(tmp_path):
    source = write_texts(tmp_path / "text", texts(60))
    with pytest.raises(UserError, match=r"validation_fraction=1e-09 of 60 documents leaves the validation split empty"):
        prepare(config(source, tmp_path / "data", validation_fraction=1e-9))
    assert not (tmp_path / "data").exists() and not (tmp_path / ".data.partial").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["seq_lenght=64"], "did you mean seq_length?"),
        (["seq_length=1"], "seq_length = 1"),
        (["validation_fraction=1"], "validation_fraction = 1"),
        (["compression=gzip"], "compression = 'gzip'"),
        (["sources=[]"], "sources = []"),
        (["sources=[{kind: stdin}]"], "can be read only once"),
        (["sources=[{kind: texts, paths: [x]}]"], "sources.0.kind = 'texts'"),
        (["bos=true"], "the tokenizer has no beginning-of-text token"),
        (["tokenizer.file=x.json"], "set exactly one of the two"),
        (["tokenizer.train_vocab_size=null"], "set exactly one of the two"),
        (["tokenizer={train_vocab_size: null, file: nowhere.json}"], "nowhere.json does not exist"),
        (["tokenizer.train_vocab_size=100"], "257 or more"),
        (["tokenizer.train_vocab_size=100000"], "give it more text or ask for a smaller vocabulary"),
        (["output=/dev/null/data"], "output=/dev/null/data cannot be made"),
        (["shard_bytes=10"], "shard_bytes=10 does not hold a row"),
        (["sources=[{kind: code, paths: [/nowhere]}]"], "'/nowhere' leads to no .py file"),
    ],
)
def test_mistakes_end_with_one_sentence_and_exit_code_2(overrides, words, tmp_path, capsys):
    source = write_texts(tmp_path / "text", texts(20))
    (tmp_path / "run.yaml").write_text(config(source, tmp_path / "data").to_yaml())
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(tmp_path / "run.yaml"), *overrides])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    keys = [name for name in PrepareConfig.model_fields if name != "sources"]
    for key in (*keys, "sources.kind", "sources.paths", "sources.exclude", "sources.suffixes", "sources.text_key"):
        assert f"  {key}" in text


SHIPPED = sorted(set(Path("configs/data").glob("*.yaml")) - set(Path("configs/data").glob("medical_*.yaml")))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_data_config_loads_and_reads_back(path):
    shipped = PrepareConfig.load(path)
    assert PrepareConfig.from_tree(yaml.safe_load(shipped.to_yaml()), source=str(path)) == shipped
