"""Each stage on its own: sources, duplicates, split, packing."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup import drop_duplicates
from data_pipeline.pack import GreedyPacker, OneDocumentPacker, cut_to_row
from data_pipeline.sources import Document, SourceConfig, find_files, read_documents
from data_pipeline.split import split_of
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError


def read_all(*sources, counts=None):
    counts = Counter() if counts is None else counts
    return list(read_documents(find_files(sources, counts), counts))


def source(kind, *paths, **keys):
    return SourceConfig(kind=kind, paths=[str(path) for path in paths], **keys)


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b/x.txt", "a/z.txt", "a/y.md", "c.txt", "a/skipped.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.text for document in read_all(source("text", tmp_path))] == [
        "a/y.md",
        "a/z.txt",
        "b/x.txt",
        "c.txt",
    ]


def test_files_reached_twice_are_read_once_and_loops_of_links_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    os.symlink(tmp_path / "a", tmp_path / "a" / "loop")
    os.symlink(tmp_path / "a" / "one.txt", tmp_path / "link.txt")
    os.symlink(tmp_path / "gone.txt", tmp_path / "dangling.txt")
    counts = Counter()
    both = source("text", tmp_path, tmp_path / "a" / "one.txt")
    assert [document.text for document in read_all(both, counts=counts)] == ["one"]
    assert counts["files_found"] == 4
    assert (counts["files_read"], counts["files_repeated"], counts["files_unreadable"]) == (1, 2, 1)


def test_files_that_are_no_text_are_counted_and_left_out(tmp_path):
    (tmp_path / "good.py").write_bytes("é\r\n".encode())
    (tmp_path / "latin1.py").write_bytes("é".encode("latin1"))
    (tmp_path / "large.py").write_bytes(b"#" * 101)
    (tmp_path / "blank.py").write_bytes(b" \n")
    counts = Counter()
    documents = read_all(source("code", tmp_path, max_file_bytes=100), counts=counts)
    assert [(document.text, document.num_bytes) for document in documents] == [("é\r\n", 4)]
    assert counts == {
        "files_found": 4,
        "files_read": 2,
        "files_not_utf8": 1,
        "files_too_large": 1,
        "documents_empty": 1,
        "documents": 1,
        "bytes": 4,
    }


def test_files_that_are_no_utf8_can_be_read_as_latin1(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("é\r\n".encode("latin1"))
    (tmp_path / "utf8.txt").write_bytes("é".encode())
    counts = Counter()
    documents = read_all(source("text", tmp_path, not_utf8="latin-1"), counts=counts)
    assert [(document.text, document.num_bytes) for document in documents] == [("é\r\n", 4), ("é", 2)]
    assert (counts["files_read"], counts["files_as_latin1"], counts["files_not_utf8"]) == (2, 1, 0)


def test_excluded_files_and_folders_are_left_out(tmp_path):
    for name in ("test/a.py", "pkg/test/b.py", "pkg/c.py", "pkg/latest/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = read_all(source("code", tmp_path, exclude=["test/*", "*/test/*"]))
    assert [document.text for document in documents] == ["pkg/c.py", "pkg/latest/d.py"]


def test_standard_library_and_installed_packages_can_be_named():
    files = find_files([source("code", "{stdlib}/json"), source("code", "{site-packages}/yaml")], Counter())
    assert {"decoder.py", "loader.py"} <= {file.path.name for file in files}


def test_each_line_of_a_jsonl_file_is_a_document_and_malformed_ones_are_counted(tmp_path):
    good = [json.dumps({"body": text}).encode() for text in ("one", "zwei\n", "trois")]
    bad = [b"{", b'{"body": "\xff"}', b'{"body": "\\ud800"}', b""]
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    counts = Counter()
    documents = read_all(source("jsonl", tmp_path, text_key="body"), counts=counts)
    assert [document.text for document in documents] == ["one", "zwei\n", "trois"]
    assert counts["lines_malformed"] == 3


def test_jsonl_without_the_text_key_is_an_error_that_names_its_keys(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"body": "x", "id": 3}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl:1 has no text under text_key='text' \(its keys: body, id\)"):
        read_all(source("jsonl", tmp_path))


def test_path_that_leads_to_no_file_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "*.py"):
        with pytest.raises(UserError, match=r"leads to no \.py file"):
            find_files([source("code", path)], Counter())


@given(st.lists(st.text(max_size=3)))
def test_the_first_of_equal_texts_stays(texts):
    documents = [Document(text, len(text.encode()), str(i)) for i, text in enumerate(texts)]
    counts = Counter()
    kept = list(drop_duplicates(documents, counts))
    assert [document.text for document in kept] == list(dict.fromkeys(texts))
    assert counts["documents"] + counts["duplicates"] == len(texts)


def test_split_depends_on_text_and_seed_alone_and_keeps_its_share():
    texts = [str(i) for i in range(4000)]
    splits = [split_of(text, seed=5, validation_fraction=0.1) for text in texts]
    assert splits == [split_of(text, seed=5, validation_fraction=0.1) for text in texts]
    assert splits != [split_of(text, seed=6, validation_fraction=0.1) for text in texts]
    assert 320 < splits.count("validation") < 480
    larger = [split_of(text, seed=5, validation_fraction=0.2) for text in texts]
    assert all(b == "validation" for a, b in zip(splits, larger, strict=True) if a == "validation")


@given(st.integers(2, 9), st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=12))
def test_packing_loses_and_adds_nothing_but_padding_at_the_end(seq_length, documents):
    eod = 0
    packer = GreedyPacker(seq_length, eod)
    rows = [row for ids in documents for row in packer.add(np.array([*ids, eod], np.uint32))]
    last, num_padding = packer.finish()
    rows += [last] if last is not None else []
    assert all(len(ids) == seq_length == sum(lengths) and min(lengths) >= 1 for ids, lengths in rows)
    line = [int(i) for ids, _ in rows for i in ids]
    assert line == [i for ids in documents for i in [*ids, eod]] + [eod] * num_padding
    assert num_padding < seq_length

    # the pieces cut each row after every end of document and nowhere else
    for number, (ids, lengths) in enumerate(rows):
        ends = (np.cumsum(lengths) - 1).tolist()
        assert ends == sorted({*np.flatnonzero(ids == eod).tolist(), seq_length - 1})
        if number == len(rows) - 1 and num_padding > 0:
            assert lengths[-num_padding:] == [1] * num_padding  # a piece of one id has no label


@given(st.integers(2, 9), st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=12))
def test_one_document_a_row_is_cut_or_padded_with_pieces_that_have_no_label(seq_length, documents):
    eod = 0
    packer = OneDocumentPacker(seq_length, eod)
    kept = [np.array([*ids, eod], np.uint32)[:seq_length] for ids in documents]
    rows = [row for ids in kept for row in packer.add(ids)]
    last, num_padding = packer.finish()
    assert last is None and len(rows) == len(documents)
    for ids, (row, lengths) in zip(kept, rows, strict=True):
        padding = seq_length - len(ids)
        assert row.dtype == np.uint32 and row.tolist() == [*ids, *[eod] * padding]
        assert lengths == [len(ids)] + [1] * padding
    assert num_padding == sum(seq_length - len(ids) for ids in kept)


def test_cut_documents_keep_the_text_of_whole_characters_and_are_counted():
    tokenizer = train_bpe(["a b"], 257)  # an id is a byte
    text = "né你好!"
    document = Document(text, len(text.encode()), "test")
    ids = np.array([*tokenizer.encode(text), tokenizer.eod_id], np.uint32)
    for seq_length, kept in [(12, text), (11, text), (10, text), (9, "né你好"), (8, "né你"), (5, "né"), (1, "n")]:
        counts = Counter()
        cut, cut_ids = cut_to_row(document, ids, seq_length=seq_length, tokenizer=tokenizer, counts=counts)
        assert cut_ids.tolist() == ids[:seq_length].tolist()
        assert (cut.text, cut.num_bytes, cut.origin) == (kept, len(kept.encode()), "test")
        if seq_length < 11:
            assert counts == {
                "documents_cut": 1,
                "tokens_cut": 11 - seq_length,
                "bytes_cut": len(text.encode()) - len(kept.encode()),
            }
        else:
            assert not counts
