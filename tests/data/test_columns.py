"""Rows with further columns: a mask of labels, and any others of a fixed size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lfm.data.batch import joined
from lfm.data.format import INDEX_NAME, Column, RowWriter, read_index
from lfm.data.mix import MixedReader, Segment
from lfm.data.reader import ShardReader
from lfm.data.stream import BatchStream, DataConfig, open_training, open_validation
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.files import json_checksum

T = 19  # not whole bytes of a mask
FACTS = {
    "split": "train",
    "eod_id": 0,
    "tokenizer_sha256": "0" * 64,
    "num_tokens": T,
    "num_padding": 0,
    "num_documents": 1,
    "text_bytes": 7,
}
# One is before doc_lengths in a stored row, the others are behind.
EXTRAS = {
    "class": Column("int32"),
    "log_likelihoods": Column("float32", (2, 3)),
    "weight": Column("float64"),
}


def rows(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "ids": random.integers(0, 300, T),
            "doc_lengths": [5, 13, 1] if i % 2 else [T],
            "label_mask": random.random(T) < 0.5,
            "extras": {
                "class": np.int32(i - 3),
                "log_likelihoods": random.normal(size=(2, 3)).astype(np.float32),
                "weight": np.float64(random.random()),
            },
        }
        for i in range(count)
    ]


def write(folder: Path, wanted: list[dict], *, extras=EXTRAS, label_mask=True, compression=None, **facts) -> None:
    writer = RowWriter(
        folder,
        seq_length=T,
        vocab_size=300,
        shard_bytes=2000,
        compression=compression,
        label_mask=label_mask,
        extras=extras,
    )
    for row in wanted:
        writer.write(
            row["ids"],
            row["doc_lengths"],
            label_mask=row["label_mask"] if label_mask else None,
            extras={name: row["extras"][name] for name in extras},
        )
    writer.finish(**{**FACTS, **facts})


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_columns_come_back_as_written(compression, tmp_path):
    wanted = rows(40)
    write(tmp_path / "train", wanted, compression=compression)
    reader = ShardReader(tmp_path / "train")
    batch = reader.read(range(40))
    assert torch.equal(batch.ids, torch.tensor(np.stack([row["ids"] for row in wanted])))
    assert batch.lengths == [row["doc_lengths"] for row in wanted]
    assert batch.label_mask is not None and batch.label_mask.dtype == torch.bool
    assert torch.equal(batch.label_mask, torch.tensor(np.stack([row["label_mask"] for row in wanted])))
    assert batch.extras.keys() == EXTRAS.keys()
    for name, found in batch.extras.items():
        want = torch.tensor(np.stack([row["extras"][name] for row in wanted]))
        assert found.dtype == want.dtype and torch.equal(found, want), name
    shards = json.loads((tmp_path / "train" / INDEX_NAME).read_bytes())["shards"]
    assert len(shards) == 3


def test_labels_are_counted_where_an_id_before_them_predicts_them(tmp_path):
    write(tmp_path / "train", rows(6))
    index, _ = read_index(tmp_path / "train")
    batch = ShardReader(tmp_path / "train").read(range(6))
    assert index.num_labels == batch.to("cpu").documents.num_labels > 0
    assert index.format_version == 2


def test_rows_without_columns_are_format_1_with_the_checksum_it_had(tmp_path):
    write(tmp_path / "train", rows(6), label_mask=False, extras={})
    tree = json.loads((tmp_path / "train" / INDEX_NAME).read_bytes())
    assert tree["lfm"]["format_version"] == 1 and "num_labels" not in tree["lfm"]
    assert tree["lfm"]["checksum"] == "e94bdced289a4f7a9158846123d5eac530cf077288967b00d61a9142cf7331f8"
    assert ShardReader(tmp_path / "train").columns == {}


def test_no_columns_and_a_mask_of_all_true_have_one_digest(tmp_path):
    wanted = rows(6)
    write(tmp_path / "plain", wanted, label_mask=False, extras={})
    write(tmp_path / "all", [{**row, "label_mask": np.ones(T, bool)} for row in wanted], extras={})
    write(tmp_path / "some", wanted, extras={})
    plain, full, some = (ShardReader(tmp_path / name).read(range(6)).digest() for name in ("plain", "all", "some"))
    assert plain == full != some


def test_a_mix_of_streams_of_the_same_columns_has_each_row_with_its_own(tmp_path):
    write(tmp_path / "a", rows(7, seed=1))
    write(tmp_path / "b", rows(5, seed=2))
    readers = [ShardReader(tmp_path / name) for name in "ab"]
    mixed = MixedReader(readers, [Segment(0, (2, 1))])
    batch = mixed.read([8, 0, 11, 3, 7])
    own = [reader.read([row]) for reader, row in ((readers[1], 1), (readers[0], 0), (readers[1], 4), (readers[0], 3))]
    assert batch[:4].digest() == joined(own, order=np.arange(4)).digest()
    assert batch[4:].digest() == readers[1].read([0]).digest()
    assert len(mixed.read([])) == 0 and mixed.index.num_labels == sum(r.index.num_labels or 0 for r in readers)


def test_a_stream_goes_on_with_the_same_columns(tmp_path):
    write(tmp_path / "train", rows(12))
    streams = [BatchStream(ShardReader(tmp_path / "train"), seed=3, rows_per_step=4, start_row=k) for k in (0, 4)]
    streams[0].next()
    assert [streams[0].next().digest() for _ in range(4)] == [streams[1].next().digest() for _ in range(4)]


def changed_index(folder: Path, change) -> None:
    """As somebody does who knows how it is made."""
    tree = json.loads((folder / INDEX_NAME).read_bytes())
    change(tree)
    del tree["lfm"]["checksum"]
    tree["lfm"]["checksum"] = json_checksum(tree)
    (folder / INDEX_NAME).write_text(json.dumps(tree, sort_keys=True))


@pytest.mark.parametrize(
    "encoding", ["bytes", "ndarray:float32", "uint16", "ndarray:float32:2,0", "ndarray:complex64:2"]
)
def test_a_column_that_no_batch_can_hold_is_one_sentence(encoding, tmp_path):
    write(tmp_path / "train", rows(3))

    def change(tree):
        shard = tree["shards"][0]
        shard["column_encodings"][shard["column_names"].index("weight")] = encoding

    changed_index(tmp_path / "train", change)
    with pytest.raises(UserError, match=f"index.json: the column weight is of {encoding}, and rows have columns of a"):
        ShardReader(tmp_path / "train")


def test_shards_of_other_columns_and_a_mask_of_another_length_are_one_sentence(tmp_path):
    write(tmp_path / "train", rows(40))
    shutil.copytree(tmp_path / "train", tmp_path / "other")

    def other(tree):
        tree["shards"][1]["column_encodings"][0] = "int16"

    changed_index(tmp_path / "train", other)
    with pytest.raises(UserError, match=r"the rows of shard\.00001\.mds have the columns class \(int16\), doc_lengths"):
        ShardReader(tmp_path / "train")
    changed_index(tmp_path / "other", lambda tree: tree["lfm"].update(seq_length=T + 8))
    with pytest.raises(
        UserError, match="label_mask is of ndarray:uint8:3, and rows of seq_length=27 have ndarray:uint8:4"
    ):
        ShardReader(tmp_path / "other")


@pytest.mark.parametrize("opened", [open_training, open_validation], ids=lambda opened: opened.__name__)
def test_streams_of_different_columns_are_refused_by_name(opened, tmp_path):
    tokenizer = train_bpe(["some text"], 257)
    for name, label_mask in (("masked", True), ("plain", False)):
        for split in ("train", "validation"):
            wanted = [{**row, "ids": row["ids"] % 257} for row in rows(3)]
            facts = {"split": split, "tokenizer_sha256": tokenizer.sha256, "eod_id": tokenizer.eod_id}
            write(tmp_path / name / split, wanted, label_mask=label_mask, extras={}, **facts)
        tokenizer.save(tmp_path / name / "tokenizer.json")
    streams = [{"name": name, "path": str(tmp_path / name), "proportion": 1} for name in ("masked", "plain")]
    config = DataConfig.from_tree({"streams": streams, "allow_smaller_tokenizer": True}, source="test")
    how = {"rows_per_step": 2} if opened is open_training else {}
    with pytest.raises(UserError) as caught:
        opened(config, seq_length=T, vocab_size=300, **how)
    assert f"the stream plain ({tmp_path}/plain) has no column beside ids" in str(caught.value)
    assert f"the stream masked ({tmp_path}/masked) has label_mask (ndarray:uint8:3) beside ids" in str(caught.value)
