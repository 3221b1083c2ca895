import json

import numpy as np
import pytest

from lfm.data.format import INDEX_NAME, RowWriter, id_dtype, read_index
from lfm.errors import UserError

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
