"""What is left out of a data set, counted by reason; and inputs of another kind than the config says, named."""

import json
import os
import subprocess
from collections import Counter

import pytest

from data_pipeline import inspect
from data_pipeline.prepare import prepare
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from tests.data.corpus import config, texts, write_texts
from tests.data_pipeline.test_sources import read

NESTED = b"[" * 100_000
UTF_16 = ("utf-16", "utf-16-le", "utf-16-be")


def lines(*records):
    return b"".join(
        (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n" for record in records
    )


def test_lines_without_a_text_are_counted_by_reason(tmp_path):
    bad = [{"text": None}, {"text": 5}, {"text": ["a"]}, {"body": "a"}, "a", NESTED, {"text": " "}, {"text": "x" * 99}]
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "good"}, *bad, {"text": "more"}))
    counts = Counter()
    assert read({"kind": "jsonl", "paths": [str(tmp_path)], "max_record_bytes": 90}, counts) == ["good", "more"]
    del counts["files_found"], counts["files_read"], counts["documents"], counts["bytes"]
    assert counts == {
        "documents_null": 1,
        "documents_of_type_int": 1,
        "documents_of_type_list": 1,
        "documents_without_text_key": 1,
        "lines_without_keys": 1,
        "documents_empty": 1,
        "documents_too_long": 2,
    }


def test_a_line_nested_beyond_measure_is_malformed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(NESTED, {"text": "good"}, NESTED.replace(b"[", b'{"a":')))
    counts = Counter()
    assert read({"kind": "jsonl", "paths": [str(tmp_path)]}, counts) == ["good"]
    assert counts["lines_malformed"] == 2


def test_a_line_in_another_code_is_malformed(tmp_path):
    surrogate = b'{"text": "\xed\xa0\x80"}'  # which Python's json would read, and UTF-8 cannot write
    first = "\ufeff".encode() + lines({"text": "good"})
    (tmp_path / "a.jsonl").write_bytes(first + lines(surrogate) + '{"text": "b"}'.encode("utf-16-be"))
    counts = Counter()
    assert read({"kind": "jsonl", "paths": [str(tmp_path)]}, counts) == ["good"]
    assert counts["lines_malformed"] == 2


@pytest.mark.parametrize(
    "content, words",
    [
        (lines({"text": 1}, {"text": 2}), r":1 has a int under text_key='text', which takes text; none of its first 2"),
        (lines({"text": {"a": 1}}), "a dict under text_key='text'"),
        (lines([{"text": "a"}]), ":1 holds a list in place of an object"),
        (json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode(), "is one JSON document over many lines"),
        (json.dumps({"text": "a"}, indent=4).encode(), "is one JSON document over many lines"),
        (b"no JSON\nat all\n", ":1 is no line of JSON in UTF-8; rewrite the file, or exclude it; none of its first 2"),
        *(
            (lines({"text": "a"}, {"text": "b"}).decode().encode(code), "is no line of JSON in UTF-8")
            for code in UTF_16
        ),
        (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "is one JSON document over many lines"),
    ],
)
def test_a_file_of_which_no_line_has_a_text_is_named(content, words, tmp_path):
    write = {"good.jsonl": lines({"text": "good"}), "odd.jsonl": content}
    for name, each in write.items():
        (tmp_path / name).write_bytes(each)
    with pytest.raises(UserError, match=rf"odd\.jsonl.*{words}"):
        read({"kind": "jsonl", "paths": [str(tmp_path)]})


def test_parquet_of_bytes_is_text_in_utf8_and_other_types_are_named(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))

    def write(name, values, kind=None):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / name)

    write("a.parquet", ["one", None, "", "x" * 99])
    write("b.parquet", ["zwei \u4f60".encode(), b"\xff", None], pyarrow.binary())
    write("c.parquet", ["trois"] * 2, pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    write("d.parquet", [None, None])
    counts = Counter()
    tree = {"kind": "parquet", "paths": [f"{tmp_path}/*.parquet"], "max_record_bytes": 90}
    assert read(tree, counts) == ["one", "zwei \u4f60", "trois", "trois"]
    assert {key: n for key, n in counts.items() if key.startswith("documents_")} == {
        "documents_null": 4,
        "documents_empty": 1,
        "documents_not_utf8": 1,
        "documents_too_long": 1,
    }
    for values, kind in (([["a"]], "list<"), ([{"a": "b"}], "struct<"), ([1], "int64")):
        write("e.parquet", values)
        with pytest.raises(UserError, match=rf"e\.parquet has the type {kind}.* in column text_key='text'"):
            read(tree)


def test_hugging_face_columns_of_another_type_are_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_bytes(lines({"text": [1]}, {"text": [2]}))
    tree = {"kind": "huggingface", "path": "json", "data_files": [f"{tmp_path}/a.jsonl"]}
    with pytest.raises(UserError, match=r"json:row 1 has a list in the column text_key='text'"):
        read(tree)


def test_what_is_no_file_is_named_or_counted_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "good"}))
    counts = Counter()
    assert read({"kind": "jsonl", "paths": [str(tmp_path)]}, counts) == ["good"]
    assert counts["files_not_regular"] == 1
    with pytest.raises(UserError, match=r"a\.jsonl is no regular file; .* kind=stdin"):
        read({"kind": "jsonl", "paths": [f"{tmp_path}/a.jsonl"]})


def test_an_empty_split_says_what_was_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": None}, b"{"))
    tree = {"sources": [{"kind": "jsonl", "paths": [str(tmp_path)]}], "tokenizer": {"train_vocab_size": 300}}
    with pytest.raises(UserError, match=r"no text .*left out: documents null 1, lines malformed 1"):
        prepare(config(tmp_path, tmp_path / "data", **tree))
    train_bpe(texts(60), 320).save(tmp_path / "tokenizer.json")
    tree["tokenizer"] = {"file": str(tmp_path / "tokenizer.json")}
    with pytest.raises(UserError, match=r"the sources hold no text; .*left out: documents null 1, lines malformed 1"):
        prepare(config(tmp_path, tmp_path / "data", **tree))


def test_names_that_are_no_utf8_are_shown_everywhere(tmp_path, capsys):
    source = write_texts(tmp_path / "text", texts(30))
    (source / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    output = tmp_path / os.fsdecode(b"d\xe9")
    sources = [{"kind": "text", "paths": [str(source)], "clean": {"min_chars": 4}}]
    prepare(config(source, output, sources=sources))
    inspect.main([str(output), "--html", str(tmp_path / os.fsdecode(b"p\xe9.html"))])
    page = (tmp_path / os.fsdecode(b"p\xe9.html")).read_text()
    assert "caf\\xe9.txt" in page and "<title>d\\xe9</title>" in page
    assert "p\\xe9.html is written" in capsys.readouterr().out


def test_folders_deeper_than_python_recurses_are_searched(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("a", dir_fd=here)
        here, parent = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(parent)
    os.close(os.open("x.txt", os.O_CREAT, dir_fd=here))
    os.close(here)
    counts = Counter()
    assert read({"kind": "text", "paths": [str(tmp_path)]}, counts) == []
    assert counts["files_found"] == 1
    subprocess.run(["rm", "-rf", tmp_path / "a"], check=True)  # pytest would recurse
