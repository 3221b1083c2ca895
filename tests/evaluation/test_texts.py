"""Perplexity and bits per byte of files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.evaluation.text import (
    Document,
    WindowConfig,
    check_windows,
    difference,
    read_documents,
    score_texts,
    together,
    windows,
)
from lfm.models.lstm import LSTM, LSTMConfig
from lfm.models.transformer import Transformer, TransformerConfig

TEXT = "def f(x):\n    return x  # \u6f22\u5b57 and more\n\nclass C:\n    pass\n" * 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 290)


@pytest.fixture(scope="module")
def carried():
    torch.manual_seed(0)
    return LSTM(LSTMConfig(hidden_size=16, num_layers=1, vocab_size=290)).eval()


@pytest.fixture(scope="module")
def limited():
    tree = {"hidden_size": 16, "num_layers": 2, "vocab_size": 290, "seq_length": 32}
    tree |= {"attention": {"num_attention_heads": 2, "num_query_groups": 1}, "ffn": {"ffn_hidden_size": 32}}
    return Transformer(TransformerConfig.from_tree(tree, source="a test")).eval()


def document(name, data, block_bytes=64):
    return Document(name, data, block_bytes)


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_each_token_but_the_first_is_scored_once_with_enough_before_it(count, context, data):
    stride = data.draw(st.integers(1, context - 1))
    scored = []
    for begin, end, first in windows(count, context, stride):
        assert end - begin <= context and begin < first <= end
        assert begin == 0 or first - begin >= context - stride
        scored += range(first, end)
    assert scored == list(range(1, count))


def test_windows_give_the_logits_of_windows(limited, tokenizer):
    data = TEXT.encode()[:400]
    ids = tokenizer.encode(data.decode())
    nats = []
    for begin, end, first in windows(len(ids), 24, 7):
        with torch.no_grad():
            logits = limited(torch.tensor([ids[begin:end]]))[0][0].float().log_softmax(-1)
        nats += [-float(logits[i - begin - 1, ids[i]]) for i in range(first, end)]
    (found,) = score_texts(limited, tokenizer, [document("a", data)], WindowConfig(context=24, stride=7), batch_size=3)
    assert found.labels == len(ids) - 1 and found.nats == pytest.approx(sum(nats), rel=1e-6)
    bits = (sum(nats) + math.log(290)) / math.log(2) / len(data)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6) and found.block_bits.sum() == pytest.approx(bits * 400)


@pytest.mark.parametrize("kind", ["carried", "limited"])
def test_batch_size_and_other_files_change_nothing(kind, tokenizer, request):
    model = request.getfixturevalue(kind)
    texts = [document(str(n), TEXT.encode()[: 50 * n + 7]) for n in range(1, 6)]
    alone = [score_texts(model, tokenizer, [text], WindowConfig(), batch_size=1)[0] for text in texts]
    for batch_size in (1, 2, 8):
        found = score_texts(model, tokenizer, texts, WindowConfig(), batch_size=batch_size)
        for one, other in zip(alone, found, strict=True):
            assert one.labels == other.labels
            np.testing.assert_allclose(one.block_bits, other.block_bits, rtol=1e-6)
    whole = together(found)
    assert whole.nats == pytest.approx(sum(score.nats for score in alone), rel=1e-6)
    assert whole.num_bytes == sum(len(text.data) for text in texts)


def test_a_beginning_of_text_makes_the_first_token_a_label(carried, tokenizer):
    begun = tokenizer.beginning_with("Z")  # which the text does not have
    data = TEXT.encode()[:100]
    (plain,) = score_texts(carried, tokenizer, [document("a", data)], WindowConfig(), batch_size=1)
    (found,) = score_texts(carried, begun, [document("a", data)], WindowConfig(), batch_size=1)
    assert found.labels == plain.labels + 1 == len(tokenizer.encode(data.decode()))


def test_bytes_that_are_no_text_are_scored_one_by_one(carried, tokenizer):
    data = "a\u6f22".encode() + b"\xff\xfe" + "\u5b57b".encode() + b"\xe6"
    ids, starts = tokenizer.encode_bytes(data)
    assert starts == sorted(starts) and starts[0] == 0 and 4 in starts and 5 in starts and starts[-1] == len(data) - 1
    assert tokenizer.encode_bytes(TEXT.encode())[0] == tokenizer.encode(TEXT)
    (found,) = score_texts(carried, tokenizer, [document("a", data)], WindowConfig(), batch_size=1)
    assert found.labels == len(ids) - 1 and found.bits_per_byte is not None


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_tokens_begin_where_their_text_does(tokenizer, text):
    ids, starts = tokenizer.encode_bytes(text.encode())
    assert ids == tokenizer.encode(text) and starts == sorted(starts)
    spelled = [len(tokenizer._inner.id_to_token(i)) for i in ids]  # a character a byte
    exact = np.cumsum([0, *spelled])[:-1] if ids else []
    # Where a character is cut over several tokens, each begins with it.
    boundaries = set(np.cumsum([0, *(len(character.encode()) for character in text)]).tolist())
    for start, at in zip(starts, exact, strict=True):
        assert start == max(boundary for boundary in boundaries if boundary <= at)


def test_a_difference_is_paired_over_stretches_of_text(carried, limited, tokenizer):
    documents = [document("a", TEXT.encode()), document("b", TEXT.encode()[:200])]
    one, other = (
        score_texts(model, tokenizer, documents, WindowConfig(context=32), batch_size=4) for model in (carried, limited)
    )
    sizes = np.concatenate([each.sizes for each in documents])
    assert sizes.sum() == sum(len(each.data) for each in documents)
    found = difference(together(one), together(other), sizes)
    assert found is not None and found.low < found.estimate < found.high
    first, second = together(one).bits_per_byte, together(other).bits_per_byte
    assert first is not None and second is not None and found.estimate == pytest.approx(second - first)
    assert difference(one[0], other[0], documents[0].sizes[:1]) is None


@pytest.mark.parametrize(
    "config, limit, words",
    [
        ({"context": 64}, 32, "more than the model's 32"),
        ({"context": 1}, None, "leaves no token before"),
        ({"context": 16, "stride": 16}, None, "nothing in common"),
        ({"stride": 4}, None, "reads whole texts"),
    ],
)
def test_windows_that_do_not_fit_are_refused(config, limit, words):
    with pytest.raises(UserError, match=words):
        check_windows(WindowConfig(**config), limit)


def test_an_empty_file_is_refused_and_a_text_of_one_token_has_no_label(tmp_path, carried, tokenizer):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_documents([tmp_path / "empty"])
    (found,) = score_texts(carried, tokenizer, [document("a", b"d")], WindowConfig(), batch_size=1)
    assert found.labels == 0 and found.perplexity is None and found.bits_per_byte == pytest.approx(math.log2(290))
