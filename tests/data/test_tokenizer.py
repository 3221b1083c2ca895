import base64
import hashlib
import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from lfm.data.published import PUBLISHED, Published
from lfm.data.tokenizer import END_OF_DOCUMENT_NAMES, Tokenizer, from_tiktoken, read_tokenizer, train_bpe
from lfm.errors import UserError
from tests.data import tokenizer_kinds
from tests.data.corpus import texts
from tests.data.tokenizer_kinds import KINDS

TEXTS = texts(200)
TOKENIZER = train_bpe(TEXTS, 400)


def make(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]().to_str().encode(), source="test")


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


@pytest.mark.parametrize("character", [" ", "\u00a0", "\n", "a", "7", "_", "\u6f22"], ids=ascii)
def test_training_on_a_million_equal_characters_ends(character):
    assert train_bpe([*TEXTS, character * 1_000_000], 300).vocab_size == 300


@given(st.text())
def test_decode_gives_back_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text, text]) == [TOKENIZER.encode(text)] * 2


def test_name_of_the_end_of_document_in_a_text_is_ordinary_text():
    text = "a<|endoftext|>b"
    assert TOKENIZER.eod_id not in TOKENIZER.encode(text) + TOKENIZER.encode_batch([text])[0]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    decoder = tokenizer.stream_decoder(prompt)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@given(st.lists(st.integers(0, 399), max_size=30))
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(ids):
    assert streamed(TOKENIZER, [], ids) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text_without_the_prompt_for_every_kind_of_tokenizer(kind):
    tokenizer = make(kind)
    chance = random.Random(0)
    prompts = ["", "quiet river", "rain in  a ", "x = 1\n", "na\u00efve \u4f60\u597d", *tokenizer_kinds.TEXTS[:5]]
    for trial in range(600):
        prompt = tokenizer.encode(prompts[trial % len(prompts)])
        ids = chance.choices(range(tokenizer.vocab_size), k=chance.randint(0, 12))
        if trial % 3 == 0 and kind == "llama":  # many bytes in a row, some of which are characters
            ids += [tokenizer.id_of(f"<0x{byte:02X}>") for byte in chance.choices(range(256), k=3)]
            ids += [tokenizer.id_of(f"<0x{byte:02X}>") for byte in "\u6f22".encode()] + ids
        whole = tokenizer.decode(prompt + ids)
        assert streamed(tokenizer, prompt, ids) == whole[len(tokenizer.decode(prompt)) :], (prompt, ids)


def test_long_streams_cost_no_more_for_each_token_than_short_ones():
    tokenizer = make("llama")
    ids = tokenizer.encode("the quiet river " * 20_000)
    decoder = tokenizer.stream_decoder(ids)
    started = time.monotonic()
    for i in ids[:2000]:
        decoder.push(i)
    assert time.monotonic() - started < 2  # as a whole text each time: minutes


@given(st.text())
def test_streaming_never_gives_half_a_character(text):
    if "\ufffd" in text:
        return
    decoder = TOKENIZER.stream_decoder()
    pieces = [decoder.push(i) for i in TOKENIZER.encode(text)]
    assert decoder.flush() == ""
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gets_the_id_of_a_control_token_whatever_the_kind_of_tokenizer(kind):
    for special in (True, False):
        tree = json.loads(KINDS[kind]().to_str())
        for token in tree["added_tokens"]:
            token["special"] = special
        if kind == "metaspace":  # a vocabulary that takes whole words, as those of tiktoken do
            tree["model"]["ignore_merges"], tree["pre_tokenizer"] = True, None
        tokenizer = Tokenizer(json.dumps(tree).encode(), source="test")
        for text in ("a</s>b", "</s>", "in </s> rain", "</s></s>"):
            ids = tokenizer.encode(text) + tokenizer.encode_batch([text])[0]
            assert tokenizer.eod_id not in ids, (special, text)
        assert tokenizer.decode([tokenizer.eod_id]) == "</s>"


def test_merges_that_spell_the_end_of_document_are_not_made():
    vocab = {"<": 0, "/": 1, "s": 2, ">": 3, "</": 4, "s>": 5, "</s>": 6, "a": 7}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [("<", "/"), ("s", ">"), ("</", "s>")]))
    tokenizer = Tokenizer(inner.to_str().encode(), source="test")
    assert tokenizer.eod_id == 6 and tokenizer.encode("a</s>a") == [7, 4, 5, 7]
    assert tokenizer.decode([7, 6]) == inner.decode([7, 6])


def test_other_added_tokens_are_words_of_the_vocabulary():
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.definition.decode())
    inner.add_tokens(["    ", "<think>"])
    inner.add_special_tokens(["<|im_start|>"])
    tokenizer = Tokenizer(inner.to_str().encode(), source="test")
    assert tokenizer.encode("<think>    ") == [401, 400]
    assert 402 not in tokenizer.encode("<|im_start|>")


def test_what_the_ids_do_not_give_back_is_told_character_by_character():
    lossy, bert, everything = make("metaspace"), make("word_pieces"), make("llama")
    for tokenizer in (lossy, bert):
        text = "in rain \u6f22\u5b57\u00df in"
        assert set("\u6f22\u5b57\u00df") <= set(tokenizer.lost(text, tokenizer.encode(text)))
        with pytest.raises(UserError, match=r"no token for '\u6f22' \(U\+6F22\) of the prompt"):
            tokenizer.encode_prompt("in \u6f22")
    assert not lossy.lost("in rain", lossy.encode("in rain"))
    text = "in \u6f22\u5b57 \U0001f600"
    assert not everything.lost(text, everything.encode(text)) and everything.encode_prompt(text)
    assert not TOKENIZER.lost(text, TOKENIZER.encode(text))


def test_unicode_forms_of_one_text_are_not_a_loss():
    tree = json.loads(TOKENIZER.definition)
    tree["normalizer"] = {"type": "NFC"}  # as Qwen's
    tokenizer = Tokenizer(json.dumps(tree).encode(), source="test")
    assert not tokenizer.lost("cafe\u0301", tokenizer.encode("cafe\u0301")) and tokenizer.encode_prompt("cafe\u0301")


def test_a_tokenizer_without_a_token_for_the_unknown_is_one_sentence():
    tokenizer = Tokenizer(tokenizer_kinds.words(unknown=None).to_str().encode(), source="words.json")
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"words\.json cannot encode every text \(.*UNK.*\); give it a token"):
            encode("neverseen")


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


def test_a_rank_file_of_unknown_origin_is_a_warning_that_names_the_key(tmp_path, capsys):
    write_rank_file(tmp_path / "mine.tiktoken")
    read_tokenizer(tmp_path / "mine.tiktoken")
    said = capsys.readouterr().err
    assert "mine.tiktoken is none of the published rank files" in said and "Set tokenizer.tiktoken_pattern to" in said
    read_tokenizer(tmp_path / "mine.tiktoken", "qwen")
    assert capsys.readouterr().err == ""


def test_a_published_rank_file_gets_its_pattern_and_special_tokens_by_its_content(tmp_path, capsys, monkeypatch):
    ranks = write_rank_file(tmp_path / "tokenizer.model")
    special = {"<|begin_of_text|>": 405, "<|end_of_text|>": 399, "<|reserved|>": 410}  # with holes, as cl100k's
    known = Published("mine", "cl100k", special, nfc=True)
    monkeypatch.setitem(PUBLISHED, hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest(), known)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\r\n".join(reversed(lines)))  # the content counts, not the bytes
    tokenizer = read_tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.eod_id, len(ranks)) == (411, 399, 399)
    assert [tokenizer.id_of(name) for name in special] == list(special.values())
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    again = tokenizer.beginning_with("<|begin_of_text|>")
    assert again.bos_id == 405 and again.encode("a 123456") == tokenizer.encode("a 123456")
    assert not {399, 405, 410} & set(again.encode("".join(special)))
    assert capsys.readouterr() == ("", "")


def test_special_tokens_of_published_files_are_as_many_as_their_models_have():
    counts = {known.name: (len(known.special), 1 + max(known.special.values())) for known in PUBLISHED.values()}
    assert counts["Llama 3"] == (256, 128256)
    assert counts["Llama 4"] == (2048, 202048)
    assert counts["Qwen"] == (208, 151851)


@pytest.mark.parametrize("name", [*END_OF_DOCUMENT_NAMES])
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
    for content, words in (
        (
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            "is a SentencePiece model; set tokenizer.file to the tokenizer.json",
        ),
        (
            b'{"config": {"default_vocab_size": 9}, "vocab": [{"token_bytes": "AA=="}]}',
            "Mistral's tekken.json; set token",
        ),
    ):
        (tmp_path / "other.model").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_tokenizer(tmp_path / "other.model")
    (tmp_path / "bad.tiktoken").write_text("hello world\n")
    with pytest.raises(UserError, match=r"bad\.tiktoken is not a tiktoken rank file: line 1"):
        from_tiktoken(tmp_path / "bad.tiktoken")
    (tmp_path / "part.tiktoken").write_text("QQ== 0\n")
    with pytest.raises(UserError, match=r"part\.tiktoken is not a whole tiktoken rank file: byte 0"):
        from_tiktoken(tmp_path / "part.tiktoken")


@pytest.mark.parametrize("text", ["plain words", "\u00e9\u4e2d\U0001f600 \u00e4"])
@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_bytes_of_tokens_join_to_those_of_the_text(kind, text):
    """Of characters that are several tokens too, whose texts alone say nothing."""
    tokenizer = train_bpe(["a few words"], 300, allow_smaller=True) if kind == "bytes" else make("llama")
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.bytes_of, ids)).decode().strip() == tokenizer.decode(ids).strip()
    assert any("\ufffd" in tokenizer.decode([id]) for id in ids) == (text != "plain words")
