"""Shards beside those of mosaicml-streaming's own writer and reader: equal in bytes, and each reads the other's."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cramjam
import numpy as np
import pytest

from lfm.data.format import INDEX_NAME, Column, RowWriter
from lfm.data.mds import ShardWriter
from lfm.data.reader import ShardReader
from lfm.errors import UserError
from lfm.files import json_checksum

FACTS = {"eod_id": 0, "tokenizer_sha256": "", "num_tokens": 8, "num_padding": 0, "num_documents": 1, "text_bytes": 7}
# One is before doc_lengths in a stored row, the others are behind.
EXTRAS = {"class": Column("int32"), "log_likelihoods": Column("float32", (2, 3)), "weight": Column("float64")}
SHARD_BYTES = 10_000


@pytest.fixture(scope="module")
def mosaic() -> ModuleType:
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("needs the extra `streaming`")
    from benchmarks.peers.mosaic import stand_in_for_torchvision

    stand_in_for_torchvision()
    import streaming.base.format

    return streaming


def write(folder: Path, *, vocab_size: int, lengths: list[int], with_columns: bool, compression: str | None) -> list:
    """Twenty rows by our writer; they come back as mosaicml-streaming's writer takes them."""
    T, random, rows = sum(lengths), np.random.default_rng(0), []
    writer = RowWriter(
        folder,
        seq_length=T,
        vocab_size=vocab_size,
        shard_bytes=SHARD_BYTES,
        compression=compression,
        label_mask=with_columns,
        extras=EXTRAS if with_columns else None,
    )
    for i in range(20):
        ids, mask = random.integers(0, vocab_size, T), random.random(T) < 0.5
        extras: dict[str, Any] = {
            "class": np.int32(i - 3),
            "log_likelihoods": random.normal(size=(2, 3)).astype(np.float32),
            "weight": np.float64(random.random()),
        }
        writer.write(ids, lengths, label_mask=mask if with_columns else None, extras=extras if with_columns else None)
        row = {"ids": ids.astype(writer._dtype), "doc_lengths": np.array(lengths, np.int32)}
        rows.append({**row, **extras, "label_mask": np.packbits(mask)} if with_columns else row)
    writer.finish(split="train", **FACTS)
    return rows


def write_by_mosaic(mosaic: ModuleType, folder: Path, ours: Path, rows: list, compression: str | None) -> None:
    """The rows of `ours` by mosaicml-streaming's writer, in an index that says what ours says."""
    tree = json.loads((ours / INDEX_NAME).read_bytes())
    shard = tree["shards"][0]
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    writer = mosaic.MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=["xxh64"], size_limit=SHARD_BYTES
    )
    for row in rows:
        writer.write(row)
    writer.finish()
    index = {**json.loads((folder / INDEX_NAME).read_bytes()), "lfm": tree["lfm"]}
    del index["lfm"]["checksum"]
    index["lfm"]["checksum"] = json_checksum(index)
    (folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))


def assert_same(found: Any, want: Any) -> None:
    assert np.array_equal(found.ids, want.ids) and found.lengths == want.lengths and found.digest() == want.digest()


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    "vocab_size, lengths, with_columns",
    [(300, [8], False), (70_000, [1] * 300 + [20], False), (300, [100, 119], True)],
)
def test_shards_are_those_of_mosaics_writer_and_its_reader_reads_ours(
    mosaic, vocab_size, lengths, with_columns, compression, tmp_path
):
    ours, theirs = tmp_path / "ours/train", tmp_path / "theirs/train"
    shape = {"vocab_size": vocab_size, "lengths": lengths, "with_columns": with_columns}
    rows = write(ours, **shape, compression=compression)
    write_by_mosaic(mosaic, theirs, ours, rows, compression)
    indices = [json.loads((folder / INDEX_NAME).read_bytes()) for folder in (ours, theirs)]
    if compression is None:
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in ours.iterdir()) == names and len(names) > 1
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    for shard in (shard for index in indices for shard in index["shards"]):
        if compression is not None:  # versions of zstd compress to other bytes
            shard["zip_data"] = shard["zip_data"]["basename"]
    assert indices[0]["version"] == indices[1]["version"] and indices[0]["shards"] == indices[1]["shards"]
    assert_same(ShardReader(ours).read(range(20)), ShardReader(theirs).read(range(20)))
    found = mosaic.StreamingDataset(local=str(ours), shuffle=False, batch_size=1)
    assert len(found) == 20
    for i, row in enumerate(rows):
        for name, value in row.items():
            assert np.array_equal(found[i][name], value), name


@pytest.mark.parametrize("compression", ["gz", "bz2:1", "br:5", "snappy", "zstd:19"])
def test_every_compression_of_mosaics_writer_is_read(mosaic, compression, tmp_path):
    ours, theirs = tmp_path / "ours/train", tmp_path / "theirs/train"
    rows = write(ours, vocab_size=300, lengths=[100, 219], with_columns=False, compression=None)
    write_by_mosaic(mosaic, theirs, ours, rows, compression)
    assert not list(theirs.glob("*.mds"))
    assert_same(ShardReader(theirs).read(range(20)), ShardReader(ours).read(range(20)))


@pytest.mark.parametrize(
    "claimed, words",
    [
        ("lzma:3", r"shard .*shard\.00000\.mds\.zstd has compression=lzma:3; only zstd, gz, bz2, br, snappy can be"),
        ("gz", r"shard .*shard\.00000\.mds\.zstd is no gz of \d+ bytes \("),
    ],
)
def test_a_compression_that_cannot_be_undone_is_one_sentence(claimed, words, tmp_path):
    write(tmp_path / "train", vocab_size=300, lengths=[8], with_columns=False, compression="zstd")
    path = tmp_path / "train" / INDEX_NAME
    tree = json.loads(path.read_bytes())
    for shard in tree["shards"]:
        shard["compression"] = claimed
    del tree["lfm"]["checksum"]
    tree["lfm"]["checksum"] = json_checksum(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=words):
        ShardReader(tmp_path / "train").read([0])


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2", "br", "snappy"])
def test_a_compressed_shard_is_unpacked_to_its_stated_size_and_no_further(compression, tmp_path):
    zeros = bytes(256 << 20)
    module = {"gz": cramjam.gzip, "bz2": cramjam.bzip2, "br": cramjam.brotli}.get(compression, cramjam.zstd)
    if compression == "br":
        bomb = bytes(cramjam.brotli.compress(zeros, 1))
    else:
        bomb = bytes((cramjam.snappy.compress_raw if compression == "snappy" else module.compress)(zeros))
    del zeros
    (tmp_path / "bomb").write_bytes(bomb)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from lfm.data.mds import decompressed
        from lfm.errors import UserError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decompressed(Path(sys.argv[1]), sys.argv[2], 1000)
        except UserError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "bomb"), compression]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    sentence, used = found.stdout.splitlines()
    assert f"bomb is no {compression} of 1000 bytes (" in sentence, found
    assert int(used) < 64 << 10, "KiB of memory"


def test_what_cannot_be_written_is_one_sentence_and_nothing_is_made(tmp_path):
    columns: dict[str, tuple[str, int | None]] = {"x": ("int64", 8)}
    with pytest.raises(UserError, match="shard_bytes=4294967296 is past what MDS can hold; set it to 4294967295"):
        ShardWriter(tmp_path / "a", columns, compression=None, shard_bytes=2**32)
    with pytest.raises(UserError, match="compression=gz is not written; choose zstd or null"):
        ShardWriter(tmp_path / "a", columns, compression="gz", shard_bytes=1000)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(UserError, match="b is not empty; write shards into another folder"):
        ShardWriter(tmp_path / "b", columns, compression=None, shard_bytes=1000)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]
