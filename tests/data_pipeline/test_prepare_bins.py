"""prepare's other outputs: train.bin and val.bin, and shards with one document a row."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline.prepare import main, prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.bins import read_record
from lfm.data.format import SPLITS, read_index
from lfm.data.reader import ShardReader
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from lfm.layers.documents import IGNORED_LABEL, Documents
from tests.data.corpus import SEQ_LENGTH, config, texts, write_texts
from tests.data_pipeline.test_prepare import contents, stored_texts

OF_THE_RUN = ("report.json", "dropped.jsonl")
BINS = {"format": "bins", "seq_length": None}
TEXTS = texts(120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TEXTS, 320)


@pytest.fixture
def read_tokenizer(tokenizer, tmp_path) -> dict:
    """The key of a config that takes it from a file."""
    tokenizer.save(tmp_path / "tokenizer.json")
    return {"tokenizer": {"file": str(tmp_path / "tokenizer.json")}}


def ids_of(data_set, name):
    return np.fromfile(data_set / name, "<u2").tolist()


@pytest.mark.parametrize("separator", ["eod", "none"])
def test_splits_by_hash_hold_the_documents_of_the_shards_in_the_same_order(separator, tmp_path):
    source = write_texts(tmp_path / "text", TEXTS)
    prepare(config(source, tmp_path / "shards"))
    report = prepare(config(source, tmp_path / "bins", separator=separator, **BINS))
    tokenizer = Tokenizer.from_file(tmp_path / "bins" / "tokenizer.json")
    record = read_record(tmp_path / "bins")
    assert record is not None and record.separator == separator
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        documents = stored_texts(tmp_path / "shards", split)
        end = [tokenizer.eod_id] if separator == "eod" else []
        ids = ids_of(tmp_path / "bins", name)
        assert ids == [i for text in documents for i in [*tokenizer.encode(text), *end]]
        counts = report["splits"][split]
        assert counts["num_documents"] == record.files[split].num_documents == len(documents)
        assert counts["text_bytes"] == record.files[split].text_bytes == sum(len(text.encode()) for text in documents)
        assert counts["num_tokens"] == record.files[split].num_tokens == len(ids)
    assert report["stages"]["encode"]["tokens"] == sum(report["splits"][split]["num_tokens"] for split in SPLITS)
    names = {path.name for path in (tmp_path / "bins").iterdir()}
    assert names == {
        "bins.json",
        "dropped.jsonl",
        "report.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
        "validation.txt",
    }
    text = (tmp_path / "shards" / "validation.txt").read_bytes()
    assert (tmp_path / "bins" / "validation.txt").read_bytes() == text


@pytest.mark.parametrize("fraction", [0.01, 0.37, 1e-9])
def test_tail_is_the_last_share_of_all_ids_and_at_least_one(fraction, tokenizer, read_tokenizer, tmp_path):
    source = write_texts(tmp_path / "text", TEXTS)
    changes = {"separator": "none", "validation": "tail", "validation_fraction": fraction}
    report = prepare(config(source, tmp_path / "data", **BINS, **read_tokenizer, **changes))
    line = [i for text in TEXTS for i in tokenizer.encode(text)]
    held_out = max(1, int(len(line) * fraction))
    assert ids_of(tmp_path / "data", "train.bin") == line[:-held_out]
    assert ids_of(tmp_path / "data", "val.bin") == line[-held_out:]
    assert report["splits"]["validation"]["num_tokens"] == held_out
    assert report["splits"]["validation"]["text_bytes"] is None


def test_fewer_than_1000_ids_are_an_error_and_leave_nothing(tokenizer, read_tokenizer, tmp_path):
    text = tokenizer.decode(tokenizer.encode("word " * 2000)[:999])
    assert len(tokenizer.encode(text)) == 999
    tail = {"separator": "none", "validation": "tail"}
    source = write_texts(tmp_path / "text", [text])
    with pytest.raises(UserError, match=r"all sources is 999 ids, fewer than the 1000 that format=bins needs"):
        prepare(config(source, tmp_path / "data", **BINS, **read_tokenizer, **tail))
    assert not (tmp_path / "data").exists() and not (tmp_path / ".data.partial").exists()
    (source / "one_more.txt").write_text("w")
    prepare(config(source, tmp_path / "data", **BINS, **read_tokenizer, **tail))


@pytest.mark.parametrize("form", [BINS, {}], ids=["bins", "mds"])
def test_max_documents_takes_the_first_and_trains_the_tokenizer_on_them_alone(form, tmp_path):
    source = write_texts(tmp_path / "text", [*TEXTS[:60], *TEXTS[:10], *TEXTS[60:]])
    report = prepare(config(source, tmp_path / "data", max_documents=70, **form))
    assert report["stages"]["limit"]["documents"] == 70 and report["stages"]["limit"]["over_limit"] > 0
    assert sum(report["splits"][split]["num_documents"] for split in SPLITS) == 70
    first = write_texts(tmp_path / "first", TEXTS[:70])
    prepare(config(first, tmp_path / "alone", **form))
    data, alone = contents(tmp_path / "data"), contents(tmp_path / "alone")
    assert {name: data[name] for name in data if name not in OF_THE_RUN} == {
        name: alone[name] for name in alone if name not in OF_THE_RUN
    }


def test_max_documents_keeps_the_tokenizers_share_of_text(tmp_path):
    source = write_texts(tmp_path / "text", texts(150))
    wanted = {"train_vocab_size": 257, "train_bytes": 10_000}
    report = prepare(config(source, tmp_path / "data", max_documents=40, tokenizer=wanted))
    assert report["tokenizer"]["trained_on_bytes"] == report["splits"]["train"]["text_bytes"] < 10_000


def test_killed_run_leaves_no_bins_and_the_next_equals_an_uninterrupted_one(read_tokenizer, tmp_path):
    source = write_texts(tmp_path / "text", texts(500, words=400))
    changes = {**BINS, **read_tokenizer, "validation": "tail"}
    run = config(source, tmp_path / "data", **changes)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    written = tmp_path / ".data.partial" / "train.bin"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.prepare", "--config", str(tmp_path / "run.yaml")],
        stdout=subprocess.DEVNULL,
    )
    give_up = time.monotonic() + 60
    while not (written.exists() and written.stat().st_size > 0) and time.monotonic() < give_up:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert written.exists() and not (tmp_path / "data").exists()
    prepare(run)
    assert not written.exists()
    prepare(config(source, tmp_path / "uninterrupted", **changes))
    assert contents(tmp_path / "data") == contents(tmp_path / "uninterrupted")


def test_shipped_laerc_config_reads_a_folder_of_text_as_one_line_of_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "text" / "deep").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text(TEXTS[0] * 40)
    (tmp_path / "text" / "blank.txt").write_text(" \n")
    (tmp_path / "text" / "deep" / "b.txt").write_bytes("né ".encode("latin1") * 400)
    (tmp_path / "text" / "readme.md").write_text("left out")
    overrides = [
        f"sources=[{{kind: text, paths: [{tmp_path / 'text'}], suffixes: [.txt], not_utf8: latin-1}}]",
        f"tokenizer.file={tmp_path / 'tokenizer.json'}",
        f"output={tmp_path / 'data'}",
    ]
    prepare(PrepareConfig.load("configs/data/laerc_custom.yaml", overrides))
    line = tokenizer.encode(TEXTS[0] * 40) + tokenizer.encode("né " * 400)
    assert ids_of(tmp_path / "data", "train.bin") + ids_of(tmp_path / "data", "val.bin") == line
    assert len(ids_of(tmp_path / "data", "val.bin")) == len(line) // 100


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["seq_length=null"], "set seq_length, or format=bins"),
        (["separator=none"], "set separator=eod, or format=bins"),
        (["format=bins"], "remove these keys, or set format=mds"),
        (["format=bins", "seq_length=null", "packing=one_document"], "remove these keys, or set format=mds"),
        (["format=bins", "seq_length=null", "compression=zstd"], "remove these keys, or set format=mds"),
        (["format=bins", "seq_length=null", "validation=tail"], "set tokenizer.file, or validation=hash"),
        (["format=bin"], "format = 'bin'"),
        (["packing=none"], "packing = 'none'"),
        (["max_documents=0"], "max_documents = 0"),
        (["sources=[{kind: jsonl, paths: [x], not_utf8: latin-1}]"], "unknown key sources.0.not_utf8"),
        (["format=bins", "seq_length=null", "validation_fraction=1e-9"], "leaves the validation split empty"),
    ],
)
def test_mistakes_in_the_new_keys_end_with_one_sentence(overrides, words, tmp_path, capsys):
    source = write_texts(tmp_path / "text", texts(60))
    (tmp_path / "run.yaml").write_text(config(source, tmp_path / "data").to_yaml())
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(tmp_path / "run.yaml"), *overrides])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_one_document_rows_hold_the_beginnings_of_the_documents_and_counts_add_up(tokenizer, read_tokenizer, tmp_path):
    source = write_texts(tmp_path / "text", TEXTS)
    report = prepare(config(source, tmp_path / "data", packing="one_document", **read_tokenizer))
    assert report == json.loads((tmp_path / "data" / "report.json").read_bytes())
    prepare(config(source, tmp_path / "greedy", **read_tokenizer))
    whole_lengths = []
    for split in SPLITS:
        originals = [[*tokenizer.encode(text), tokenizer.eod_id] for text in stored_texts(tmp_path / "greedy", split)]
        whole_lengths += [len(ids) for ids in originals]
        reader = ShardReader(tmp_path / "data" / split)
        batch = reader.read(range(len(reader)))
        ids, lengths = batch.ids, batch.lengths
        labels = Documents.from_lengths(lengths, "cpu").labels(ids)
        padding = 0
        for row, original in enumerate(originals):
            kept = original[:SEQ_LENGTH]
            free = SEQ_LENGTH - len(kept)
            assert ids[row].tolist() == kept + [tokenizer.eod_id] * free
            assert labels[row].tolist() == kept[1:] + [IGNORED_LABEL] * (free + 1)
            assert reader.num_padding(row, lengths[row]) == free
            padding += free
        index, _ = read_index(tmp_path / "data" / split)
        assert (index.packing, index.num_padding, index.num_rows) == ("one_document", padding, len(originals))
        assert index.num_tokens + index.num_padding == index.num_rows * SEQ_LENGTH
    cut = [length - SEQ_LENGTH for length in whole_lengths if length > SEQ_LENGTH]
    assert 0 < len(cut) < len(TEXTS)
    assert report["stages"]["pack"]["documents_cut"] == len(cut)
    assert report["stages"]["pack"]["tokens_cut"] == sum(cut)
    text = (tmp_path / "data" / "validation.txt").read_bytes()
    assert len(text) == report["splits"]["validation"]["text_bytes"]
    total = sum(report["splits"][split]["text_bytes"] for split in SPLITS) + report["stages"]["pack"]["bytes_cut"]
    assert total == sum(len(text.encode()) for text in TEXTS)
