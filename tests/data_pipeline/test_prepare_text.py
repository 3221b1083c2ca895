"""Data sets made with tokenizers of other kinds, and of texts that tokenizers have trouble with."""

import json

import numpy as np
import pytest

from data_pipeline.fast_tokenizer import FastEncoder, first_difference
from data_pipeline.prepare import main, prepare
from lfm.data.format import SPLITS, read_index
from lfm.data.tokenizer import Tokenizer, train_bpe
from tests.data import tokenizer_kinds
from tests.data.corpus import config, texts, write_texts
from tests.data.tokenizer_kinds import KINDS

LINES = [f"{i}: {text}" for i, text in enumerate(tokenizer_kinds.TEXTS[:60])]


def prepared(folder, kind, documents, *, changes=None, **more):
    """The report of a data set made with a tokenizer of `kind`, whose definition may be changed; and the tokenizer."""
    tree = json.loads(KINDS[kind]().to_str()) | (changes or {})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(json.dumps(tree).encode())
    source = write_texts(folder / "text", documents)
    report = prepare(config(source, folder / "data", tokenizer={"file": str(folder / "tokenizer.json")}, **more))
    return report, Tokenizer.from_file(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["unigram", "llama", "word_ends"])
def test_documents_that_name_the_end_token_stay_one_document(kind, tmp_path):
    for special in (True, False):
        added = [token | {"special": special} for token in json.loads(KINDS[kind]().to_str())["added_tokens"]]
        documents = [line + " a</s>b </s>" for line in LINES]
        folder = tmp_path / str(special)
        more = {"format": "bins", "seq_length": None, "changes": {"added_tokens": added}}
        _, tokenizer = prepared(folder, kind, documents, **more)
        ids = np.concatenate([np.fromfile(folder / f"data/{name}.bin", np.uint16) for name in ("train", "val")])
        assert np.count_nonzero(ids == tokenizer.eod_id) == len(documents)


@pytest.mark.parametrize("packing", ["greedy", "one_document"])
@pytest.mark.parametrize("kind", ["metaspace", "word_ends"])
def test_what_the_tokenizer_does_not_know_is_counted_and_said(kind, packing, tmp_path, capsys):
    bare = ["\u6f22\u5b57" * n for n in range(1, 11)]
    some = [line + " stra\u00dfe" for line in LINES]
    report, _ = prepared(tmp_path, kind, [*bare, *some, *LINES], packing=packing)
    encode = report["stages"]["encode"]
    assert encode["documents_lost"] == 10 and encode["documents"] == len(some) + len(LINES)
    assert encode["documents_with_lost_characters"] >= len(some)
    assert encode["bytes_lost"] >= sum(len(text.encode()) for text in bare) + 2 * len(some)
    said = capsys.readouterr().out
    assert f"does not give back {encode['bytes_lost']:,} bytes of text" in said and "'\\u6f22'" in said
    # Bits per byte are over the text that is encoded, and that text is what compressors are compared on.
    indexes = {split: read_index(tmp_path / "data" / split)[0] for split in SPLITS}
    kept = (tmp_path / "data/validation.txt").read_bytes()
    assert len(kept) == indexes["validation"].text_bytes > 0
    assert not set("\u6f22\u5b57\u00df") & set(kept.decode())
    cut = report["stages"]["pack"]["bytes_cut"]
    total = sum(len(text.encode()) for text in [*bare, *some, *LINES])
    assert sum(index.text_bytes for index in indexes.values()) + encode["bytes_lost"] + cut == total
    samples = [json.loads(line) for line in (tmp_path / "data/dropped.jsonl").read_bytes().splitlines()]
    assert [sample["rule"] for sample in samples if sample["rule"] == "encode"] == ["encode"] * 5


def test_a_tokenizer_that_knows_bytes_loses_nothing_and_nothing_is_said(tmp_path, capsys):
    report, _ = prepared(tmp_path, "llama", [*LINES, "\u6f22\u5b57\u00df \U0001f600"])
    assert "bytes_lost" not in report["stages"]["encode"] and "warning" not in capsys.readouterr().out


def test_a_word_without_a_token_is_one_sentence(tmp_path, capsys):
    tokenizer_kinds.words(unknown=None).save(str(tmp_path / "tokenizer.json"))
    tree = config(write_texts(tmp_path / "text", ["never seen"]), tmp_path / "data")
    tree = tree.model_dump(mode="json") | {"tokenizer": {"file": str(tmp_path / "tokenizer.json")}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["--config", str(tmp_path / "run.yaml")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "cannot encode every text" in said


@pytest.mark.parametrize("character", [" ", "\u00a0", "\n", "a", "=", "\u6f22", "a "], ids=ascii)
def test_a_million_equal_characters_are_a_document_as_any_other(character, tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = train_bpe(texts(200), 320)
    fast = FastEncoder.make(tokenizer)
    assert isinstance(fast, FastEncoder)
    long = "x" + character * (1_000_000 // len(character)) + "x"
    assert first_difference(fast, tokenizer, [long]) is None  # where tiktoken gives up, it says so
    if character == " ":
        assert fast.encode(long) is None
        report = prepare(config(write_texts(tmp_path / "text", [*texts(60), long]), tmp_path / "data"))
        assert report["stages"]["encode"]["documents"] == 61
        assert sum(split["text_bytes"] for split in report["splits"].values()) > 1_000_000
