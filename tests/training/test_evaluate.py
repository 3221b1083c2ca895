import math

import pytest

from lfm.data.stream import open_split
from lfm.training.evaluate import compressor_bits_per_byte, evaluate
from tests.training.tiny_run import tiny_run


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
@pytest.mark.parametrize("left_out", [0, 1])
def test_padding_is_left_out_exactly_where_it_was_read(batch_rows, left_out, text_data, tmp_path):
    run = tiny_run(tmp_path, text_data)
    rows = open_split(run.data, "validation", seq_length=64, vocab_size=512)
    found = evaluate(lambda ids, lengths: (0.0, 0), rows, max_rows=len(rows) - left_out, batch_rows=batch_rows)
    assert found.tokens == (rows.index.num_tokens if left_out == 0 else 64 * (len(rows) - 1))
    assert found.token_counts.sum() == found.tokens


def test_a_uniform_model_costs_log2_of_the_vocabulary_for_every_token(text_data, tmp_path):
    rows = open_split(tiny_run(tmp_path, text_data).data, "validation", seq_length=64, vocab_size=512)

    def uniform(ids, lengths):
        labels = sum(length - 1 for row in lengths for length in row)
        return labels * math.log(512), labels

    text_bytes = (text_data / "validation.txt").stat().st_size
    bits = evaluate(uniform, rows).bits_per_byte(text_bytes, 512)
    assert bits == pytest.approx(9 * rows.index.num_tokens / text_bytes)


def test_unigram_entropy_lies_below_uniform_and_compressors_below_eight_bits(text_data, tmp_path):
    rows = open_split(tiny_run(tmp_path, text_data).data, "validation", seq_length=64, vocab_size=512)
    text = (text_data / "validation.txt").read_bytes()
    found = evaluate(lambda ids, lengths: (0.0, 0), rows)
    assert 0 < found.unigram_bits_per_byte(len(text)) < 9 * rows.index.num_tokens / len(text)
    assert all(0 < bits < 8 for bits in compressor_bits_per_byte(text).values())
