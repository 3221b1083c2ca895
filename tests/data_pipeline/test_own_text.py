"""`lfm prepare FILE`: what is chosen for a text, how one document is split, and what is said to a wrong one."""

import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import FileBatch, InputFile, PieceBatch, documents
from data_pipeline.own_text import own_text
from data_pipeline.pieces import cut, first_bad_byte
from data_pipeline.prepare import main
from data_pipeline.unpack import Limits
from lfm.data.format import SplitIndex
from lfm.data.stream import DataConfig, open_split
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from tests.data.corpus import texts


def book(num_bytes: int) -> bytes:
    """Distinct lines of words, accents, Chinese and CRLF."""
    lines = "\r\n".join(texts(200 + num_bytes // 100, words=20)).encode()
    return lines[:num_bytes].decode(errors="ignore").encode()


@settings(deadline=None, max_examples=60)
@given(
    st.text(st.sampled_from("ab \n\u00e9\u4f60\U0001f389"), min_size=1, max_size=300),
    st.floats(0.01, 0.9),
    st.integers(8, 64),
)
def test_pieces_are_the_file_and_text_each_and_the_last_are_held_out(tmp_path_factory, text, tail, piece_bytes):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(content := text.encode())
    pieces = cut(path, len(content), tail=tail, piece_bytes=piece_bytes)
    assert b"".join(content[p.start : p.end] for p in pieces) == content
    assert all(content[p.start : p.end].decode() and p.end - p.start <= piece_bytes for p in pieces)
    held_out = [p.held_out for p in pieces]
    assert held_out == sorted(held_out) and held_out[-1]
    size = sum(p.end - p.start for p in pieces if p.held_out)
    assert len(content) * tail - 1 <= size <= max(2 * len(content) * tail, 4) + 4


def test_where_a_file_stops_being_text(tmp_path):
    path = tmp_path / "a"
    long = "\u4f60".encode() * (1 << 19)  # characters lie across the blocks that are read
    for content, bad in [(b"", None), (long, None), (long + b"\xff", len(long)), (long[:-1], len(long) - 3)]:
        path.write_bytes(content)
        assert first_bad_byte(path) == bad
    path.write_bytes(long + b"a\0b")
    assert first_bad_byte(path) == len(long) + 1


def test_a_book_is_split_by_position_and_its_tokenizer_sees_the_training_part_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my book.txt").write_bytes(content := book(60_000) + b"\nzyxzyxzyx" * 300)
    main(["my book.txt"])
    out = capsys.readouterr().out
    assert "vocabulary: at most " in out and "rows: 64 ids" in out and "held out: the last 10.00% of each file" in out
    assert out.endswith("next: lfm train --data 'data/my book' --family liquidnet --minutes 5\n")
    report = json.loads((tmp_path / "data/my book/report.json").read_text())
    held_out = (tmp_path / "data/my book/validation.txt").read_bytes()
    assert content.endswith(held_out)
    assert report["splits"]["train"]["text_bytes"] + len(held_out) == len(content)
    assert len(content) * 0.1 <= len(held_out) <= len(content) * 0.2
    tokenizer = Tokenizer.from_file(tmp_path / "data/my book/tokenizer.json")
    assert report["tokenizer"]["trained_on_bytes"] <= len(content) - len(held_out)
    data = DataConfig(path=str(tmp_path / "data/my book"))
    rows = open_split(data, "train", seq_length=64, vocab_size=tokenizer.vocab_size)
    assert isinstance(rows.index, SplitIndex) and rows.index.num_rows > 100
    main(["my book.txt"])
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["my book.txt", "seq_length=32"])
    assert "set overwrite=true" in capsys.readouterr().err


def test_folders_globs_kinds_and_own_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(book(20_000))
    (tmp_path / "in/empty.txt").touch()
    (tmp_path / "in/latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in/b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300)))
    main(["in", "output=in/data", "tokenizer.train_vocab_size=300", "seq_length=32"])
    out = capsys.readouterr().out
    assert "rows:" not in out and "vocabulary:" not in out and "held out:" in out
    report = json.loads((tmp_path / "in/data/report.json").read_text())
    assert report["tokenizer"]["vocab_size"] == 300 and report["splits"]["train"]["seq_length"] == 32
    sources = report["stages"]["sources"]
    assert (sources["files_found"], sources["files_read"], sources["files_not_utf8"]) == (4, 3, 1)
    main(["in", "output=in/data", "tokenizer.train_vocab_size=300", "seq_length=32"])
    assert "already prepared" in capsys.readouterr().out, "a data set inside its source is not read as text"
    of_glob = own_text(["in/*.txt", "in/b.jsonl", "seed=3"], spool=tmp_path)
    assert [source.kind for source in of_glob.config.sources] == ["text", "jsonl"] and of_glob.config.seed == 3
    many = tmp_path / "many"
    many.mkdir()
    for i, text in enumerate(texts(201)):
        (many / f"{i}.txt").write_text(text)
    assert own_text([str(many)], spool=tmp_path).config.validation == "hash"


@pytest.mark.parametrize("num_bytes, seq_length, least, most", [(1 << 10, 16, 257, 320), (1_000_000, 256, 1500, 2500)])
def test_standard_input_of_any_size(num_bytes, seq_length, least, most, tmp_path):
    command = [sys.executable, "-m", "data_pipeline.prepare", "-", f"output={tmp_path}/data"]
    found = subprocess.run(command, input=book(num_bytes), capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["config"]["sources"][0]["paths"] == ["-"] and report["sources"][0]["name"] == "text -"
    assert report["splits"]["train"]["seq_length"] == seq_length
    assert least <= report["tokenizer"]["vocab_size"] <= most


def test_the_same_standard_input_is_the_same_data_set_and_bad_bytes_are_those_of_it(tmp_path, monkeypatch, capsys):
    def piped(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        main(["-", f"output={tmp_path}/data"])

    piped(text := book(3000))
    report = (tmp_path / "data/report.json").read_bytes()
    piped(text)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        piped(text[:-1] + b"~")
    assert "set overwrite=true" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        piped(b"caf\xe9")
    assert capsys.readouterr().err.startswith("error: the standard input is no text in UTF-8 (byte 3 is 0xe9)")
    assert (tmp_path / "data/report.json").read_bytes() == report


def test_the_choices_stay_legal_for_a_gigabyte(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(1_000_000_000)  # zeros, which take no room
    (tmp_path / "large.txt").rename(tmp_path / "large.jsonl")
    config = own_text([str(tmp_path / "large.jsonl")], spool=tmp_path).config
    assert (config.tokenizer.train_vocab_size, config.seq_length) == (32768, 1024)
    assert config.validation_fraction == 0.0005 and config.output == "data/large"


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "there is nothing to prepare; give files of text"),
        (["seq_length=32"], "there is nothing to prepare"),
        (["none.txt"], "source none.txt leads to no file; correct it"),
        (["none/*.txt"], "source none/*.txt leads to no file; correct it"),
        (["folder"], "source folder holds no .txt"),
        (["others"], "file (left out: 1 file with other names, such as others/a.docx); correct it"),
        (["pdf.txt"], "pdf.txt is a PDF; take its text out of it first"),
        (["utf16.txt"], "utf16.txt is text in UTF-16; convert it by `iconv -f utf-16"),
        (["good.txt", "text_key=body"], "text_key=body: it is for .jsonl and .parquet, and there are none"),
        (["body.jsonl"], "(its keys: body); set text_key to one of them"),
        (["pairs.jsonl"], "(its keys: prompt, completion); set labels=completion, which reads prompts and"),
        (["talks.jsonl"], "(its keys: messages); set labels=completion, which reads messages"),
        (["empty.txt"], "no text to train a tokenizer on"),
        (["short.txt"], "the text is too short: its train split has "),
        (["same.txt"], "the text is too short: its validation split has "),
        (["binary.txt"], "binary.txt is no text in UTF-8 (byte 3 is 0x00); convert it"),
        (
            ["latin.txt"],
            "latin.txt is no text in UTF-8 (byte 3 is 0xe9); convert it from its encoding, for instance by `iconv",
        ),
        (["packed.txt.gz"], "packed.txt.gz is compressed, and a few files of text are split by position"),
        (["-"], "the standard input (-) is empty"),
        (
            ["good.txt", "outptu=x"],
            "unknown key outptu (value 'x') in what is chosen for the text with the command line",
        ),
        (["good.txt", "sources=[{kind: text, paths: [good.txt], markup: html}]"], "a file with markup is not cut"),
        (["good.txt", "output=good.txt"], "exists and is no data set"),
        (["nope://bucket/a.txt"], "no file system is called nope; use https://"),
        (["gs://bucket/a.txt"], "needs the package gcsfs; install it with `pip install gcsfs`"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(words, sentence, tmp_path, monkeypatch, capsys):
    if "gs://" in str(words) and importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open("/dev/null", encoding="utf-8"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others/a.docx").touch()
    (tmp_path / "pdf.txt").write_bytes(b"%PDF-1.4 plain")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "body.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "talks.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_bytes(book(9000))
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "same.txt").write_text("a" * 20_000)
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "packed.txt.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "data").exists() or all(
        path.name.endswith(".lock") for path in (tmp_path / "data").iterdir()
    )


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(book(5000))
    file = InputFile(path, "skip", "none", 5000, 0, Limits(1 << 20, 1))
    *_, last = cut(path, path.stat().st_size, tail=0.1, piece_bytes=1 << 19)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="has changed while it was read"):
        list(documents(PieceBatch(0, file, last, True), Counter()))


def test_names_in_capitals_are_taken_others_counted_and_byte_order_marks_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/.git").mkdir(parents=True)
    (tmp_path / "in/A.TXT").write_bytes(b"\xef\xbb\xbf" + book(9000))
    (tmp_path / "in/B.JSONL").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(100)))
    for name in (".git/x", "x.docx", "y.docx"):
        (tmp_path / "in" / name).touch()
    main(["in"])
    assert "left out: 3 files with other names, such as in/x.docx\n" in capsys.readouterr().out
    sources = json.loads((tmp_path / "data/in/report.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["text in", "jsonl in"]
    assert sources[0]["bytes"] == 9000, "a mark is no text"
    whole = InputFile(tmp_path / "in/A.TXT", "skip", "none", 9003, 0, Limits(1 << 20, 1))
    [document] = documents(FileBatch(0, 9003, (whole,)), Counter())
    assert document.text.encode() == book(9000), "nor of a file that is not cut"


@pytest.mark.parametrize("key", ["text_key=body", "labels=completion"])
@pytest.mark.parametrize("is_talk", [False, True])
def test_lines_of_json_with_other_keys(key, is_talk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for text in texts(200):
            talk = [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]
            record = {"messages": talk} if is_talk else {"prompt": text[:9], "completion": text[9:]}
            print(json.dumps(record | {"body": text}), file=file)
    main(["a.jsonl", key])
    assert capsys.readouterr().out.endswith("next: lfm train --data data/a --family liquidnet --minutes 5\n")
    index = json.loads((tmp_path / "data/a/train/index.json").read_text())["lfm"]
    assert ("num_labels" in index) == (key == "labels=completion") and index["num_documents"] > 100


def test_a_name_with_an_equals_sign_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt").write_bytes(book(3000))
    found = own_text(["a=b.txt"], spool=tmp_path)
    assert found.config.output == "data/a=b"
