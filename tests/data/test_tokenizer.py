import base64
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.tokenizer import Tokenizer, from_tiktoken, train_bpe
from lfm.errors import UserError
from tests.data.corpus import texts

TEXTS = texts(200)
TOKENIZER = train_bpe(TEXTS, 400)


def write_rank_file(path: Path) -> dict[bytes, int]:
    """The ranks of TOKENIZER (its id 0 is the end of document, then come bytes and merges) as a tiktoken file."""
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.definition.decode())
    byte_of = {}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    for byte in printable:
        byte_of[chr(byte)] = byte
    for i, byte in enumerate(b for b in range(256) if b not in printable):
        byte_of[chr(256 + i)] = byte
    ranks = {bytes(byte_of[c] for c in token): i - 1 for token, i in inner.get_vocab().items() if i > 0}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ranks


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 400])
def test_trained_bpe_has_exactly_the_requested_size(vocab_size):
    tokenizer = train_bpe(TEXTS, vocab_size)
    assert tokenizer.vocab_size == vocab_size
    ids = {i for text in TEXTS for i in tokenizer.encode(text)}
    assert max(ids) < vocab_size and tokenizer.eod_id not in ids


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(TEXTS, 400).sha256 == TOKENIZER.sha256


@pytest.mark.parametrize("vocab_size, words", [(256, "257 or more"), (100_000, "only")])
def test_impossible_vocabulary_size_is_an_error(vocab_size, words):
    with pytest.raises(UserError, match=words):
        train_bpe(TEXTS[:5], vocab_size)


@given(st.text())
def test_decode_gives_back_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text, text]) == [TOKENIZER.encode(text)] * 2


def test_name_of_the_end_of_document_in_a_text_is_ordinary_text():
    text = "a<|endoftext|>b"
    assert TOKENIZER.eod_id not in TOKENIZER.encode(text) + TOKENIZER.encode_batch([text])[0]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, 399), max_size=30))
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(ids):
    decoder = TOKENIZER.stream_decoder()
    assert "".join([decoder.push(i) for i in ids] + [decoder.flush()]) == TOKENIZER.decode(ids)


@given(st.text())
def test_streaming_never_gives_half_a_character(text):
    if "\ufffd" in text:
        return
    decoder = TOKENIZER.stream_decoder()
    pieces = [decoder.push(i) for i in TOKENIZER.encode(text)]
    assert decoder.flush() == ""
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text


def test_saved_tokenizer_is_the_same_byte_for_byte(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (loaded.sha256, loaded.vocab_size, loaded.eod_id) == (TOKENIZER.sha256, 400, 0)
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


@pytest.mark.parametrize("pattern", [None, "gpt2", "cl100k", "o200k"])
def test_tiktoken_file_gives_the_ids_of_tiktoken(pattern, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    published = pytest.importorskip("tiktoken_ext.openai_public")
    ranks = write_rank_file(tmp_path / "small.tiktoken")
    patterns = {
        None: published.r50k_pat_str,
        "gpt2": published.r50k_pat_str,
        "cl100k": (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
        "o200k": (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    }
    theirs = tiktoken.Encoding(
        "small", pat_str=patterns[pattern], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    ours = from_tiktoken(tmp_path / "small.tiktoken", pattern)
    assert (ours.vocab_size, ours.eod_id) == (400, 399)
    for text in [*TEXTS, "I'll say: don't  STOP\n\n\n  12345 \r\n\tEnd   "]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


def test_tiktoken_conversion_gives_the_merges_of_the_tokenizer_it_came_from(tmp_path):
    write_rank_file(tmp_path / "small.tiktoken")
    converted = from_tiktoken(tmp_path / "small.tiktoken")
    merges = [json.loads(tokenizer.definition)["model"]["merges"] for tokenizer in (TOKENIZER, converted)]
    assert merges[0] == merges[1]


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>"])
def test_usual_end_of_document_names_are_found(name):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, name: 1}, []))
    assert Tokenizer(inner.to_str().encode(), source="test").eod_id == 1


def test_bad_tokenizer_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json does not exist"):
        Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "broken.json")
    no_end = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    no_end.save(str(tmp_path / "no_end.json"))
    with pytest.raises(UserError, match=r"no_end\.json has no end-of-document token"):
        Tokenizer.from_file(tmp_path / "no_end.json")
    (tmp_path / "bad.tiktoken").write_text("hello world\n")
    with pytest.raises(UserError, match=r"bad\.tiktoken is not a tiktoken rank file: line 1"):
        from_tiktoken(tmp_path / "bad.tiktoken")
    (tmp_path / "part.tiktoken").write_text("QQ== 0\n")
    with pytest.raises(UserError, match=r"part\.tiktoken is not a whole tiktoken rank file: byte 0"):
        from_tiktoken(tmp_path / "part.tiktoken")
