"""Each stage on its own: sources, duplicates, split, packing."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data_pipeline.batches import documents
from data_pipeline.dedup import ExactDuplicates, digest
from data_pipeline.pack import BestFitPacker, GreedyPacker, OneDocumentPacker, SplitCounter
from data_pipeline.sources import SourceConfig, find_files, read_batches
from data_pipeline.split import in_validation
from data_pipeline.worker import text_of_beginning
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError


def read_all(*sources, counts=None):
    counts = Counter() if counts is None else counts
    batches = read_batches(sources, find_files(sources, counts))
    return [document for batch in batches for document in documents(batch, counts)]


def source(kind, *paths, **keys):
    return TypeAdapter(SourceConfig).validate_python({"kind": kind, "paths": [str(path) for path in paths], **keys})


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
    found = find_files([source("code", "{stdlib}/json"), source("code", "{site-packages}/yaml")], Counter())
    assert [
        name in {file.path.name for file in files}
        for name, files in zip(("decoder.py", "loader.py"), found, strict=True)
    ] == [True, True]


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
    exact = ExactDuplicates()
    assert [text for text in texts if exact.is_new(digest(text.encode()))] == list(dict.fromkeys(texts))


def test_split_depends_on_text_and_seed_alone_and_keeps_its_share():
    texts = [str(i).encode() for i in range(4000)]
    held_out = [in_validation(text, 5, 0.1) for text in texts]
    assert held_out == [in_validation(text, 5, 0.1) for text in texts]
    assert held_out != [in_validation(text, 6, 0.1) for text in texts]
    assert 320 < sum(held_out) < 480
    larger = [in_validation(text, 5, 0.2) for text in texts]
    assert all(b for a, b in zip(held_out, larger, strict=True) if a)


def packed(packer, documents):
    """The rows of documents that come two at a time."""
    rows = []
    for i in range(0, len(documents), 2):
        pair = documents[i : i + 2]
        rows += packer.add(np.array([i for ids in pair for i in ids], np.uint32), np.array([len(ids) for ids in pair]))
    rows += packer.finish()
    for ids, lengths in rows:
        assert len(ids) == lengths.sum() and lengths.min() >= 1 and (ids.dtype, lengths.dtype) == (np.uint32, np.int32)
    return rows, packer


@given(st.integers(2, 9), st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=12))
def test_packing_loses_and_adds_nothing_but_padding_at_the_end(seq_length, documents):
    eod = 0
    rows, packer = packed(GreedyPacker(seq_length, eod), [[*ids, eod] for ids in documents])
    num_padding = packer.num_padding
    line = [int(i) for ids, _ in rows for i in ids]
    assert line == [i for ids in documents for i in [*ids, eod]] + [eod] * num_padding
    assert num_padding < seq_length

    # the pieces cut each row after every end of document and nowhere else
    for number, (ids, lengths) in enumerate(rows):
        ends = (np.cumsum(lengths) - 1).tolist()
        assert ends == sorted({*np.flatnonzero(ids == eod).tolist(), seq_length - 1})
        if number == len(rows) - 1 and num_padding > 0:
            assert lengths[-num_padding:].tolist() == [1] * num_padding  # a piece of one id has no label


@given(st.integers(2, 9), st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=12))
def test_one_document_a_row_is_cut_or_padded_with_pieces_that_have_no_label(seq_length, documents):
    eod = 0
    kept = [[*ids, eod][:seq_length] for ids in documents]
    rows, packer = packed(OneDocumentPacker(seq_length, eod), kept)
    assert len(rows) == len(documents)
    for ids, (row, lengths) in zip(kept, rows, strict=True):
        padding = seq_length - len(ids)
        assert row.tolist() == [*ids, *[eod] * padding]
        assert lengths.tolist() == [len(ids)] + [1] * padding
    assert packer.num_padding == sum(seq_length - len(ids) for ids in kept)


@given(st.integers(2, 9), st.lists(st.integers(1, 30), max_size=40), st.sampled_from([4, 40, 1000]))
def test_best_fit_splits_only_what_is_longer_than_a_row_and_crops_only_single_ids(seq_length, sizes, window):
    documents = [[100 * i + k for k in range(size)] for i, size in enumerate(sizes, start=1)]
    rows, packer = packed(BestFitPacker(seq_length, 0, window_tokens=window), documents)
    pieces = [
        ids[end - length : end].tolist()
        for ids, lengths in rows
        for length, end in zip(lengths.tolist(), np.cumsum(lengths).tolist(), strict=True)
    ]
    wanted = [ids[i : i + seq_length] for ids in documents for i in range(0, len(ids), seq_length)]
    assert sorted(piece for piece in pieces if len(piece) > 1) == sorted(piece for piece in wanted if len(piece) > 1)
    assert packer.num_cropped == sum(len(piece) == 1 for piece in wanted)
    assert packer.num_padding == pieces.count([0]) == sum(len(piece) == 1 for piece in pieces)
    for ids, _ in rows:
        assert 0 not in np.trim_zeros(ids, "b")  # padding is at the end


def test_best_fit_fills_rows_that_first_come_first_served_would_not():
    rows, packer = packed(BestFitPacker(10, 0), [[1] * n for n in (3, 7, 4, 6, 2, 8, 5, 5)])
    assert len(rows) == 4 and packer.num_padding == 0


@given(st.integers(2, 9), st.lists(st.integers(1, 30), max_size=40))
def test_documents_that_greedy_splits_are_counted_as_it_splits_them(seq_length, sizes):
    documents = [[i] * size for i, size in enumerate(sizes, start=1)]
    rows, _ = packed(GreedyPacker(seq_length, 0), documents)
    counter = SplitCounter(seq_length)
    for size in sizes:
        counter.add(np.array([size]))
    assert counter.num_split == sum(sum(i in ids for ids, _ in rows) > 1 for i in range(1, len(sizes) + 1))


def test_text_of_a_beginning_ends_with_a_whole_character():
    tokenizer = train_bpe(["a b"], 257)  # an id is a byte
    text = "n\u00e9\u4f60\u597d!"
    ids = np.array([*tokenizer.encode(text), tokenizer.eod_id], np.uint32)
    for length, kept in [(10, text), (9, text[:4]), (8, text[:3]), (5, text[:2]), (1, "n")]:
        assert text_of_beginning(ids[:length], tokenizer, None) == kept
        assert text_of_beginning(np.array([7, *ids[:length]]), tokenizer, 7) == kept
