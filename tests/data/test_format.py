import json

import numpy as np
import pytest

from data_pipeline.verify import Verification
from lfm.data.format import INDEX_NAME, RowWriter, id_dtype, read_index
from lfm.data.reader import ShardReader
from lfm.errors import UserError
from lfm.files import json_checksum

FACTS = {
    "split": "train",
    "eod_id": 0,
    "tokenizer_sha256": "0" * 64,
    "num_tokens": 8,
    "num_padding": 0,
    "num_documents": 1,
    "text_bytes": 7,
}


def write_split(folder, *, vocab_size=300, ids=(1, 2, 3, 4, 5, 6, 7, 0), doc_lengths=(8,), shard_bytes=10_000):
    writer = RowWriter(folder, seq_length=8, vocab_size=vocab_size, shard_bytes=shard_bytes, compression=None)
    writer.write(np.array(ids), list(doc_lengths))
    return writer.finish(**FACTS)


@pytest.mark.parametrize(
    "vocab_size, dtype", [(257, "uint16"), (65536, "uint16"), (65537, "uint32"), (128256, "uint32")]
)
def test_ids_are_stored_in_the_narrowest_dtype_that_holds_them(vocab_size, dtype, tmp_path):
    assert id_dtype(vocab_size) == dtype
    index = write_split(tmp_path / "train", vocab_size=vocab_size, ids=[vocab_size - 1] * 8)
    assert index.dtype == dtype
    _, shards = read_index(tmp_path / "train")
    assert dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True)) == {
        "ids": f"ndarray:{dtype}:8",
        "doc_lengths": "ndarray:int32",
    }


def test_index_reads_back_as_written(tmp_path):
    index = write_split(tmp_path / "train")
    assert read_index(tmp_path / "train")[0] == index
    assert (index.num_rows, index.seq_length, index.vocab_size) == (1, 8, 300)


def test_any_damage_to_the_index_is_noticed(tmp_path):
    write_split(tmp_path / "train")
    path = tmp_path / "train" / INDEX_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for damaged in (whole[:position], whole[:position] + b"9" + whole[position + 1 :]):
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"index\.json"):
                read_index(tmp_path / "train")


def test_index_of_another_format_version_is_an_error(tmp_path):
    write_split(tmp_path / "train")
    path = tmp_path / "train" / INDEX_NAME
    tree = json.loads(path.read_bytes())
    tree["lfm"]["format_version"] = 99
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="format_version=99"):
        read_index(tmp_path / "train")


def test_folder_that_is_still_being_written_is_no_split(tmp_path):
    writer = RowWriter(tmp_path / "train", seq_length=8, vocab_size=300, shard_bytes=10_000, compression=None)
    for _ in range(1000):
        writer.write(np.zeros(8, np.int64), [8])
    assert list((tmp_path / "train").glob("shard.*"))
    with pytest.raises(UserError, match="does not exist"):
        read_index(tmp_path / "train")
    writer.finish(**FACTS)
    assert read_index(tmp_path / "train")[0].num_rows == 1000


def test_shards_too_small_for_a_row_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"shard_bytes=100 does not hold a row of seq_length=8"):
        write_split(tmp_path / "train", shard_bytes=100)


SHARD = ("shards", 0)
RAW = (*SHARD, "raw_data")


@pytest.mark.parametrize(
    "place, value, words",
    [
        *[
            ((*RAW, "basename"), name, r"basename=.*: this is not one plain file name")
            for name in (
                "/etc/x",
                "../x",
                "..",
                ".",
                "",
                "a/b",
                "a\\b",
                "a\0b",
                ".lock",
                "*",
                "a\n",
                "\u00e9",
                "x" * 151,
            )
        ],
        ((*RAW, "basename"), "\ud800", "basename="),
        ((*RAW, "basename"), 3, r"shards\.0\.raw_data\.basename=3: "),
        ((*RAW, "basename"), INDEX_NAME, r"the basename index\.json is that of two files"),
        ((*RAW, "bytes"), -1, r"bytes=-1: "),
        ((*RAW, "bytes"), 2**32, "past what MDS can hold"),
        ((*RAW, "hashes"), {}, r"raw_data: hashes has no xxh64"),
        (RAW, None, r"shards\.0\.raw_data=None: "),
        (
            (*SHARD, "zip_data"),
            {"basename": "z", "bytes": 1, "hashes": {"xxh64": "0"}},
            "zip_data is of no compression",
        ),
        ((*SHARD, "samples"), 10**9, "does not hold samples=1000000000"),
        ((*SHARD, "samples"), True, "samples=True"),
        ((*SHARD, "column_names"), ["ids"], "are not as many"),
        (("shards",), [], r"shards=\[\]: "),
        (("shards",), [1], r"shards\.0=1: "),
        (("lfm", "num_rows"), 10**12, "num_rows=1000000000000, and the samples of the shards are 1"),
        (("lfm", "seq_length"), 0, "seq_length=0"),
        (("lfm", "dtype"), [], "dtype="),
    ],
)
def test_an_index_that_is_wrong_and_has_a_right_checksum_is_one_sentence(place, value, words, tmp_path):
    write_split(tmp_path / "train")
    rewrite(tmp_path / "train", place, value)
    with pytest.raises(UserError, match=rf"train/index\.json is wrong: .*{words}") as raised:
        read_index(tmp_path / "train")
    assert str(raised.value).isprintable()
    assert str(raised.value) in Verification(str(tmp_path), full=False).run().problems


def test_a_shard_too_small_for_its_rows_is_one_sentence(tmp_path):
    write_split(tmp_path / "train")
    rewrite(tmp_path / "train", ("lfm", "seq_length"), 10**12)
    rewrite(tmp_path / "train", (*SHARD, "column_encodings"), ["ndarray:int32", f"ndarray:uint16:{10**12}"])
    with pytest.raises(UserError, match=r"bytes, which do not hold 1 rows of seq_length=1000000000000"):
        ShardReader(tmp_path / "train")


def rewrite(folder, place, value):
    """Replace a value of the index, and make its checksum anew."""
    path = folder / INDEX_NAME
    tree = json.loads(path.read_bytes())
    *outer, last = place
    inner = tree
    for key in outer:
        inner = inner[key]
    inner[last] = value
    del tree["lfm"]["checksum"]
    tree["lfm"]["checksum"] = json_checksum(tree)
    path.write_text(json.dumps(tree))
