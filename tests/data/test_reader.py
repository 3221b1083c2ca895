"""Every kind of damage ends in an error that names the shard: never in silence, a shorter epoch or a hang."""

import json
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lfm.data.format import INDEX_NAME, RowWriter
from lfm.data.mds import ShardWriter
from lfm.data.reader import ShardReader
from lfm.data.stream import BatchStream
from lfm.errors import UserError
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE
from tests.data.damage import cut, empty, fill_with_zeros, flip, remove

DAMAGES = [flip, fill_with_zeros, cut, remove, empty]


def read_epoch(folder, *, threads=0, remote=None):
    """All rows of one epoch through a stream."""
    reader = ShardReader(folder, remote=remote)
    stream = BatchStream(reader, seed=0, rows_per_step=4, prefetch_threads=threads)
    try:
        ids, lengths = [], []
        for _ in range(len(reader) // 4):
            batch = stream.next()
            ids.append(batch.ids)
            lengths += batch.lengths
        return torch.cat(ids), lengths
    finally:
        stream.close()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("compression", ["raw", "zstd"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_shard_is_an_error_that_names_it(damage, compression, place, threads, request, tmp_path):
    source = request.getfixturevalue(f"{compression}_data_set") / "train"
    folder = shutil.copytree(source, tmp_path / "train")
    name = "shard.00002.mds" + (".zstd" if compression == "zstd" else "")
    damage(folder / name)
    started = time.monotonic()
    with pytest.raises(UserError, match=name) as caught:
        if place == "local":
            read_epoch(folder, threads=threads)
        else:
            read_epoch(tmp_path / "cache", threads=threads, remote=str(folder))
    assert "restore it" in str(caught.value) or "check data.remote" in str(caught.value)
    assert time.monotonic() - started < 10
    left_over = {path.name for path in (tmp_path / "cache").glob("*")}
    assert name not in left_over and not any(path.endswith(".tmp") for path in left_over)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_index_is_an_error_that_names_it(damage, data_set):
    damage(data_set / "train" / INDEX_NAME)
    with pytest.raises(UserError, match=r"index\.json"):
        ShardReader(data_set / "train")


@pytest.mark.parametrize("damage", [flip, fill_with_zeros, cut, empty], ids=lambda damage: damage.__name__)
def test_damaged_file_in_the_cache_is_an_error_that_says_to_delete_it(damage, zstd_data_set, tmp_path):
    remote = str(zstd_data_set / "train")
    read_epoch(tmp_path, remote=remote)
    for name in ("shard.00001.mds", "shard.00001.mds.zstd"):
        damage(tmp_path / name)
        if name.endswith("zstd"):
            (tmp_path / "shard.00001.mds").unlink()
        with pytest.raises(UserError, match=f"{name} .* delete it and it will be fetched again"):
            read_epoch(tmp_path, remote=remote)
        (tmp_path / name).unlink()
        read_epoch(tmp_path, remote=remote)


@pytest.mark.parametrize("damage", [cut, remove, empty], ids=lambda damage: damage.__name__)
def test_shard_that_breaks_while_in_use_is_an_error(damage, data_set):
    reader = ShardReader(data_set / "train")
    reader.read(range(len(reader)))
    damage(data_set / "train" / "shard.00001.mds")
    with pytest.raises(UserError, match=r"shard\.00001\.mds changed while in use"):
        reader.read(range(len(reader)))


@pytest.mark.parametrize("threads", [0, 2])
def test_all_ways_to_reach_a_data_set_give_the_same_rows(threads, raw_data_set, zstd_data_set, tmp_path):
    want = read_epoch(raw_data_set / "train")
    zstd_copy = shutil.copytree(zstd_data_set / "train", tmp_path / "zstd")
    for folder, remote in [
        (raw_data_set / "train", None),
        (zstd_copy, None),
        (zstd_copy, None),  # again, now that it is decompressed
        (tmp_path / "raw cache", str(raw_data_set / "train")),
        (tmp_path / "zstd cache", str(zstd_data_set / "train")),
        (tmp_path / "zstd cache", str(zstd_data_set / "train")),
    ]:
        ids, lengths = read_epoch(folder, threads=threads, remote=remote)
        assert torch.equal(ids, want[0]) and lengths == want[1]
    assert ids.dtype == torch.int64 and ids.shape[1] == SEQ_LENGTH


def test_many_threads_may_read_from_a_fresh_cache(zstd_data_set, tmp_path):
    reader = ShardReader(tmp_path / "cache", remote=str(zstd_data_set / "train"))
    rows = list(range(len(reader)))
    with ThreadPoolExecutor(8) as threads:
        batches = list(threads.map(lambda shift: reader.read(rows[shift:] + rows[:shift]), range(8)))
    for shift, batch in enumerate(batches):
        assert torch.equal(torch.roll(batch.ids, shift, dims=0), batches[0].ids)


def test_cache_of_another_version_of_the_data_set_is_an_error(raw_data_set, zstd_data_set, tmp_path):
    read_epoch(tmp_path, remote=str(raw_data_set / "train"))
    with pytest.raises(UserError, match="caches another data set"):
        read_epoch(tmp_path, remote=str(zstd_data_set / "train"))


def test_remote_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/train/index\.json cannot be fetched"):
        ShardReader(tmp_path / "cache", remote=str(tmp_path / "nowhere" / "train"))
    with pytest.raises(UserError, match=r"gopher://host/train/index\.json cannot be fetched"):
        ShardReader(tmp_path / "cache", remote="gopher://host/train")


def test_fetch_that_takes_too_long_ends_with_the_name_of_the_file(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="needs the extra `remote`")
    with socket.create_server(("127.0.0.1", 0)) as silent_server:  # accepts the connection and never answers
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent_server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "made-up")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        with pytest.raises(UserError, match=r"s3://bucket/train/index\.json was not fetched within .*=1;"):
            ShardReader(tmp_path / "cache", remote="s3://bucket/train", fetch_timeout_seconds=1)


@pytest.mark.parametrize(
    "ids, lengths, words",
    [
        ([1] * 8, [4, 3], "do not add up to seq_length=8"),
        ([1] * 8, [9, -1], "do not add up to seq_length=8"),
        ([1] * 7 + [300], [8], "has id 300 in row 0, past vocab_size=300"),
    ],
)
def test_row_that_contradicts_the_index_is_an_error(ids, lengths, words, tmp_path):
    folder = tmp_path / "train"
    writer = RowWriter(folder, seq_length=8, vocab_size=300, shard_bytes=10_000, compression=None)
    # past the writer's own checks, as a defective writer would
    writer._writer.write(writer._layout.join(np.array(ids, np.uint16), np.array(lengths, np.int32), {}))
    writer.finish(
        split="train", eod_id=0, tokenizer_sha256="", num_tokens=8, num_padding=0, num_documents=1, text_bytes=7
    )
    with pytest.raises(UserError, match=words):
        ShardReader(folder).read([0])


def test_a_plain_mds_folder_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path / "train", {"x": ("int", 8)}, compression=None, shard_bytes=1000)
    writer.write(bytes(8))
    (tmp_path / "train" / INDEX_NAME).write_text(json.dumps({"version": 2, "shards": writer.finish()}))
    with pytest.raises(UserError, match=r"was not made by data_pipeline\.prepare"):
        ShardReader(tmp_path / "train")


def test_a_shard_written_to_in_place_while_in_use_is_hashed_again(data_set):
    reader = ShardReader(data_set / "train")
    want = reader.read(range(len(reader))).ids
    path = data_set / "train" / "shard.00001.mds"
    content = path.read_bytes()
    os.utime(path)
    assert torch.equal(reader.read(range(len(reader))).ids, want)
    with open(path, "r+b") as file:
        file.write(bytes([content[0] ^ 1]))
    with pytest.raises(UserError, match=r"shard\.00001\.mds changed while in use and is damaged: its xxh64"):
        reader.read(range(len(reader)))
    path.write_bytes(content)
    assert torch.equal(reader.read(range(len(reader))).ids, want)


def test_one_process_reads_20_million_tokens_a_second(tmp_path):
    writer = RowWriter(tmp_path / "train", seq_length=8192, vocab_size=128256, shard_bytes=1 << 22, compression=None)
    random = np.random.default_rng(0)
    for _ in range(256):
        writer.write(random.integers(0, 128256, 8192), [4000, 4192])
    writer.finish(
        split="train", eod_id=0, tokenizer_sha256="", num_tokens=8, num_padding=0, num_documents=1, text_bytes=7
    )
    stream = BatchStream(ShardReader(tmp_path / "train"), seed=0, rows_per_step=16)
    rates = []
    for _ in range(64):  # the fastest of many: what a busy machine took away is not the reader's
        start = time.perf_counter()
        ids = stream.next().ids
        rates.append(ids.numel() / (time.perf_counter() - start))
    assert max(rates) > 20e6


def test_data_set_in_the_tests_has_several_shards_and_all_of_its_vocabulary(raw_data_set):
    tree = json.loads((raw_data_set / "train" / INDEX_NAME).read_bytes())
    assert len(tree["shards"]) > 4
    assert tree["lfm"]["vocab_size"] == VOCAB_SIZE
