"""train.bin and val.bin: which ids make a row, and an error that names the file for whatever can be wrong with it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.write_bins import BinsWriter
from lfm.data.bins import BINS_NAME, BinReader
from lfm.data.stream import BatchStream, DataConfig, open_split, resume_row
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from tests.data.corpus import VOCAB_SIZE, make_data_set, texts

T = 32


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """By data_pipeline.prepare, with bins.json."""
    return make_data_set(tmp_path_factory.mktemp("bins"), format="bins", seq_length=None)


@pytest.fixture
def bins(written, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "bins"))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """From elsewhere, without bins.json; id i stands at position i, so that rows show their place."""
    folder = tmp_path_factory.mktemp("found")
    train_bpe(texts(200), VOCAB_SIZE).save(folder / "tokenizer.json")
    np.arange(300, dtype="<u2").tofile(folder / "train.bin")
    np.arange(100, dtype="<u2").tofile(folder / "val.bin")
    return folder


@pytest.fixture
def foreign(found, tmp_path) -> Path:
    return Path(shutil.copytree(found, tmp_path / "foreign"))


def open_bins(folder, split="train", *, seq_length=T, vocab_size=VOCAB_SIZE, **keys):
    return open_split(DataConfig(path=str(folder), **keys), split, seq_length=seq_length, vocab_size=vocab_size)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("split, name", [("train", "train.bin"), ("validation", "val.bin")])
def test_sequential_rows_are_the_whole_windows_of_the_file(split, name, written):
    stored = np.fromfile(written / name, "<u2")
    reader = open_bins(written, split)
    assert len(reader) == len(stored) // T > 5 and len(stored) % T > 0
    batch = reader.read(range(len(reader)))
    ids, lengths = batch.ids, batch.lengths
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == stored[: len(reader) * T].tolist()
    assert lengths == [[T]] * len(reader)
    index = reader.index
    assert (index.num_tokens, index.num_padding, index.vocab_size) == (len(stored), 0, VOCAB_SIZE)


def test_steps_of_sequential_windows_take_each_row_once_an_epoch(found):
    reader = open_bins(found)
    stream = BatchStream(reader, seed=0, rows_per_step=3)
    starts = torch.cat([stream.next().ids for _ in range(len(reader) // 3)])[:, 0].tolist()
    assert sorted(starts) == list(range(0, 9 * T, T)) and starts != sorted(starts)


def test_random_windows_start_anywhere_that_leaves_room_for_a_row_and_one_more_id(found):
    reader = open_bins(found, windows="random")
    stream = BatchStream(reader, seed=0, rows_per_step=5000)
    batch = stream.next()
    ids, lengths = batch.ids, batch.lengths
    starts = ids[:, :1]
    assert torch.equal(ids, starts + torch.arange(T)) and lengths == [[T]] * 5000
    counts = torch.bincount(starts.flatten())
    assert len(counts) == 300 - T - 1 and counts.min() > 0
    assert counts.float().std() < 2 * counts.float().mean().sqrt()  # as independent draws have it


def test_validation_is_sequential_whatever_the_windows(found):
    reader = open_bins(found, "validation", windows="random")
    assert reader.read(range(len(reader))).ids[:, 0].tolist() == [0, T, 2 * T]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([0, 2]),
    st.sampled_from(["random", "sequential"]),
)
def test_resuming_anywhere_gives_the_same_rest(found, steps, rows, rows_later, threads, windows):
    reader = open_bins(found, windows=windows)
    whole = BatchStream(reader, seed=5, rows_per_step=1)
    want = [whole.next().ids for _ in range(steps * rows + 2 * rows_later)][steps * rows :]
    first = BatchStream(reader, seed=5, rows_per_step=rows, prefetch_threads=threads)
    for _ in range(steps):
        first.next()
    state = first.state()
    first.close()
    again = open_bins(found, windows=windows)
    resumed = BatchStream(
        again, seed=5, rows_per_step=rows_later, start_row=resume_row(state, again, seed=5), prefetch_threads=threads
    )
    assert torch.equal(torch.cat([resumed.next().ids for _ in range(2)]), torch.cat(want))
    resumed.close()


def test_resuming_with_other_rows_or_another_file_is_an_error(foreign, bins):
    for folder in (foreign, bins):
        state = BatchStream(open_bins(folder), seed=1, rows_per_step=2).state()
        for keys in ({"windows": "random"}, {"seq_length": T // 2}):
            with pytest.raises(UserError, match=r"keep data\.windows and seq_length"):
                resume_row(state, open_bins(folder, **keys), seed=1)
    np.zeros(2_000_000, "<u2").tofile(foreign / "train.bin")
    state = BatchStream(open_bins(foreign), seed=1, rows_per_step=2).state()
    for position in (0, -1):
        flip(foreign / "train.bin", position)
        with pytest.raises(UserError, match="is not the data set the checkpoint was trained on"):
            resume_row(state, open_bins(foreign), seed=1)
        flip(foreign / "train.bin", position)
    resume_row(state, open_bins(foreign), seed=1)


def test_ids_of_a_large_vocabulary_are_read_as_uint32(foreign):
    definition = json.loads((foreign / "tokenizer.json").read_bytes())
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] += [{"id": 320 + i, "content": f"<|unused {i}|>", **special} for i in range(65_536)]
    (foreign / "tokenizer.json").write_text(json.dumps(definition))
    ids = np.arange(65_500, 65_856, dtype="<u4")
    ids.tofile(foreign / "train.bin")
    reader = open_bins(foreign, vocab_size=65_856)
    assert reader.index.dtype == "uint32"
    assert reader.read(range(len(reader))).ids.flatten().tolist() == ids[: len(reader) * T].tolist()


def test_vocabulary_that_does_not_fit_the_model_is_an_error(found):
    with pytest.raises(UserError, match=r"has 320 ids, more than the model's vocab_size=300"):
        open_bins(found, vocab_size=300)
    with pytest.raises(UserError, match=r"fewer than the model's vocab_size=512; .*allow_smaller_tokenizer"):
        open_bins(found, vocab_size=512)
    assert len(open_bins(found, vocab_size=512, allow_smaller_tokenizer=True)) > 0


@pytest.mark.parametrize(
    "split, gone, words",
    [
        ("validation", "val.bin", r"val\.bin does not exist and .* holds train\.bin; put it there"),
        ("train", "train.bin", r"train\.bin does not exist and .* holds val\.bin; put it there"),
        ("train", "tokenizer.json", r"tokenizer\.json does not exist"),
    ],
)
def test_missing_file_is_an_error_that_names_it(split, gone, words, foreign):
    (foreign / gone).unlink()
    with pytest.raises(UserError, match=words):
        open_bins(foreign, split)


def test_size_that_is_no_number_of_ids_is_an_error(foreign):
    with open(foreign / "val.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(
        UserError, match=r"val\.bin has 201 bytes, no multiple of 2, and a vocabulary of 320 is stored as"
    ):
        open_bins(foreign, "validation")


@pytest.mark.parametrize("windows, needed", [("sequential", T + 1), ("random", T + 2)])
def test_fewer_ids_than_a_row_and_one_more_are_an_error(windows, needed, foreign):
    np.zeros(needed - 1, "<u2").tofile(foreign / "train.bin")
    with pytest.raises(
        UserError, match=rf"train\.bin holds {needed - 1} ids, fewer than the {needed} that .*seq_length=32"
    ):
        open_bins(foreign, windows=windows)
    np.zeros(needed, "<u2").tofile(foreign / "train.bin")
    reader = open_bins(foreign, windows=windows)
    assert len(reader) == 1 and reader.read([0]).ids.shape == (1, T)


@pytest.mark.parametrize("windows", ["sequential", "random"])
def test_id_past_the_vocabulary_is_an_error_that_names_file_and_position(windows, foreign):
    ids = np.zeros(300, "<u2")
    ids[[70, 90]] = 320, 999
    ids.tofile(foreign / "train.bin")
    reader = open_bins(foreign, windows=windows)
    row = 70 // T if windows == "sequential" else 60
    with pytest.raises(UserError, match=r"train\.bin has id 320 at position 70, past the vocab_size=320"):
        reader.read([0, row])
    reader.read([0])


def test_tokenizer_that_did_not_make_the_ids_is_an_error(bins):
    train_bpe(texts(100), VOCAB_SIZE).save(bins / "tokenizer.json")
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        with pytest.raises(UserError, match=rf"{name} is of another tokenizer than .*tokenizer\.json"):
            open_bins(bins, split)


@pytest.mark.parametrize("split, name", [("train", "train.bin"), ("validation", "val.bin")])
def test_file_of_another_size_than_bins_json_says_is_an_error(split, name, bins):
    whole = (bins / name).read_bytes()
    for content in (whole[:-2], whole[: len(whole) // 4], whole + whole[:2]):
        (bins / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} has {len(content)} bytes instead of {len(whole)}"):
            open_bins(bins, split)


@pytest.mark.parametrize("position", [0, 1001, -1])
def test_flipped_byte_is_an_error_before_any_row_of_its_block_is_read(position, bins):
    flip(bins / "train.bin", position)
    reader = open_bins(bins)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.bin is damaged: its xxh64 .* or delete bins\.json if"):
            reader.read([1])
    (bins / BINS_NAME).unlink()
    open_bins(bins).read([1])


def test_damage_is_found_in_each_block_that_a_row_touches(tmp_path, found):
    tokenizer = Tokenizer.from_file(found / "tokenizer.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    with BinsWriter(tmp_path, tokenizer, separator="none", tail=0.4, block_bytes=100) as writer:
        writer.add("train", np.arange(300, dtype=np.uint32), num_documents=1, text_bytes=1, text=b"x")
    writer.finish()
    rows = open_bins(tmp_path).read(range(5)).ids  # 64 bytes each
    assert rows.flatten().tolist() == list(range(160))
    assert open_bins(tmp_path, "validation").read([0]).ids.flatten().tolist() == list(range(180, 212))
    flip(tmp_path / "train.bin", 110)
    reader = open_bins(tmp_path)
    for row in range(5):
        if 64 * row < 200 and 64 * row + 64 > 100:
            with pytest.raises(UserError, match=r"train\.bin is damaged: its xxh64 from byte 100 on"):
                reader.read([row])
        else:
            assert torch.equal(reader.read([row]).ids[0], rows[row])


@pytest.mark.parametrize("origin", ["bins", "foreign"])
def test_file_that_is_cut_while_in_use_is_an_error(origin, request):
    folder = request.getfixturevalue(origin)
    reader, unread = open_bins(folder), open_bins(folder)
    reader.read(range(len(reader)))
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:100])
    for each in (reader, unread):
        with pytest.raises(UserError, match=r"train\.bin changed while in use"):
            each.read(range(len(reader)))


def test_file_of_a_reader_that_is_gone_is_closed(found):
    before = len(os.listdir("/proc/self/fd"))
    readers = [open_bins(found) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del readers
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_damage_to_bins_json_is_noticed(bins):
    path = bins / BINS_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for damaged in (whole[:position], whole[:position] + b"9" + whole[position + 1 :]):
            if damaged != whole:
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=r"bins\.json"):
                    BinReader(bins, "train", seq_length=T, windows="sequential")


def test_random_windows_of_shards_are_an_error(raw_data_set):
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=r"data\.windows=random is for train\.bin .*; set data\.windows=sequential"):
            open_bins(raw_data_set, split, windows="random")


def test_remote_bins_and_a_folder_of_both_kinds_are_errors(bins, raw_data_set):
    with pytest.raises(UserError, match=r"data\.remote=s3://bucket/x fetches shards"):
        open_bins(bins, remote="s3://bucket/x")
    shutil.copytree(raw_data_set / "train", bins / "train")
    with pytest.raises(UserError, match=r"holds shards and \.bin files; move one"):
        open_bins(bins)
