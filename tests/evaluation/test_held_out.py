import math

import numpy as np
import pytest

from data_pipeline.pack import GreedyPacker
from lfm.data.format import RowWriter
from lfm.data.reader import ShardReader
from lfm.data.stream import open_split
from lfm.errors import UserError
from lfm.evaluation.held_out import compressor_bits_per_byte, evaluate, spread, together
from tests.data.corpus import make_data_set
from tests.training.tiny_run import tiny_run


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
@pytest.mark.parametrize("left_out", [0, 1])
def test_padding_is_left_out_exactly_where_it_was_read(batch_rows, left_out, text_data, tmp_path):
    run = tiny_run(tmp_path, text_data)
    rows = open_split(run.data, "validation", seq_length=64, vocab_size=512)
    found = evaluate(lambda batch: (0.0, 0), rows, max_rows=len(rows) - left_out, batch_rows=batch_rows)
    assert found.tokens == (rows.index.num_tokens if left_out == 0 else 64 * (len(rows) - 1))
    assert found.token_counts.sum() == found.tokens


def test_a_uniform_model_costs_log2_of_the_vocabulary_for_every_token(text_data, tmp_path):
    rows = open_split(tiny_run(tmp_path, text_data).data, "validation", seq_length=64, vocab_size=512)

    def uniform(batch):
        labels = sum(length - 1 for row in batch.lengths for length in row)
        return labels * math.log(512), labels

    text_bytes = (text_data / "validation.txt").stat().st_size
    bits = evaluate(uniform, rows).bits_per_byte(text_bytes, 512)
    assert bits == pytest.approx(9 * rows.index.num_tokens / text_bytes)


def test_unigram_entropy_lies_below_uniform_and_compressors_below_eight_bits(text_data, tmp_path):
    rows = open_split(tiny_run(tmp_path, text_data).data, "validation", seq_length=64, vocab_size=512)
    text = (text_data / "validation.txt").read_bytes()
    found = evaluate(lambda batch: (0.0, 0), rows)
    assert 0 < found.unigram_bits_per_byte(len(text)) < 9 * rows.index.num_tokens / len(text)
    assert all(0 < bits < 8 for bits in compressor_bits_per_byte(text, found).values())


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_few_rows_are_of_all_of_a_split(count):
    """Rows lie in the order of their sources."""
    assert spread(None, 60) == spread(100, 60) == list(range(60))
    found = spread(count, 60)
    assert len(set(found)) == count and found == sorted(found) and found[0] == 0
    assert max(np.diff([*found, 60])) <= math.ceil(60 / count), "no gap is larger than another by more than a row"


@pytest.fixture(scope="module")
def one_document_data(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("one document"), packing="one_document", seq_length=64)


@pytest.mark.parametrize("left_out", [0, 1, 7])
def test_padding_of_every_row_is_left_out_where_each_holds_one_document(left_out, one_document_data):
    rows = ShardReader(one_document_data / "validation")
    count = len(rows) - left_out
    documents = [lengths[0] for lengths in rows.read(spread(count, len(rows))).lengths]
    assert min(documents) < rows.index.seq_length == max(documents)
    found = evaluate(lambda batch: (0.0, 0), rows, max_rows=count, batch_rows=3)
    assert found.tokens == found.token_counts.sum() == sum(documents)
    if left_out == 0:
        assert found.tokens == rows.index.num_tokens


def test_a_uniform_model_costs_log2_of_the_vocabulary_for_every_token_that_was_kept(one_document_data):
    rows = ShardReader(one_document_data / "validation")

    def uniform(batch):
        labels = sum(length - 1 for row in batch.lengths for length in row)
        return labels * math.log(256), labels

    text_bytes = (one_document_data / "validation.txt").stat().st_size
    assert text_bytes == rows.index.text_bytes
    bits = evaluate(uniform, rows).bits_per_byte(text_bytes, 256)
    assert bits == pytest.approx(8 * rows.index.num_tokens / text_bytes)


def test_an_end_of_document_before_the_padding_is_no_padding(tmp_path):
    writer = RowWriter(tmp_path / "validation", seq_length=4, vocab_size=9, shard_bytes=10_000, compression=None)
    packer = GreedyPacker(4, eod_id=0)
    for row in packer.add(np.array([1, 2, 3, 4, 0], np.uint32), np.array([5])):
        writer.write(*row)
    [last] = packer.finish()
    assert last[1].tolist() == [1, 1, 1, 1]  # the end of the document looks like the padding after it
    writer.write(*last)
    facts = {"eod_id": 0, "tokenizer_sha256": "", "num_documents": 1, "text_bytes": 4}
    writer.finish(split="validation", num_tokens=5, num_padding=packer.num_padding, **facts)
    found = evaluate(lambda batch: (0.0, 0), ShardReader(tmp_path / "validation"))
    assert found.tokens == 5 and found.token_counts.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_bits_per_byte_of_masked_rows_are_refused(tmp_path):
    writer = RowWriter(
        tmp_path / "validation", seq_length=4, vocab_size=9, shard_bytes=10_000, compression=None, label_mask=True
    )
    writer.write(np.array([1, 2, 3, 8]), [4], label_mask=np.array([False, False, True, True]))
    writer.finish(
        split="validation",
        eod_id=8,
        tokenizer_sha256="",
        num_tokens=4,
        num_padding=0,
        num_documents=1,
        text_bytes=3,
    )
    found = evaluate(lambda batch: (1.0, batch.to("cpu").documents.num_labels), ShardReader(tmp_path / "validation"))
    assert found.loss == 0.5
    for ask in (
        lambda: found.bits_per_byte(3, 9),
        lambda: found.unigram_bits_per_byte(3),
        lambda: compressor_bits_per_byte(b"abc", together([found])),
    ):
        with pytest.raises(UserError, match="a mask makes 2 of the 4 held-out ids labels; compare losses"):
            ask()
