"""Stop texts: what is shown does not depend on how tokens cut the text, and holds no part of one."""

import random

import pytest
import torch

from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.inference.conversation import Conversation
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import StopFilter, Writer, continuations
from lfm.models.lstm import LSTM, LSTMConfig
from tests.data.tokenizer_kinds import KINDS

TEXT = "def f(x):\n    return x\n\nUser: hi\n\u6f22\u5b57\n" * 4


def shown(text: str, stops: list[str], cuts: list[int]) -> str:
    filter_, found, start = StopFilter(stops), "", 0
    for cut in [*sorted(cuts), len(text)]:
        found += filter_.push(text[start:cut])
        start = cut
    return found + filter_.flush()


@pytest.mark.parametrize(
    "stops, wanted",
    [
        (["User:"], "abab"),
        (["ba"], "a"),
        (["abU", "bUs"], "ab"),
        (["babUser", "User"], "a"),  # complete at the same character: the longest
        (["se", "babUsex"], "ababU"),
        (["ababUser: ab!", "none"], "ababUser: ab"),
    ],
)
def test_text_ends_before_the_first_stop_text_however_it_is_cut(stops, wanted):
    chance = random.Random(0)
    text = "ababUser: ab"
    for _ in range(50):
        assert shown(text, stops, [chance.randrange(len(text)) for _ in range(chance.randrange(12))]) == wanted


def test_only_what_may_become_a_stop_text_is_held_back():
    filter_ = StopFilter(["\nUser:"])
    assert [filter_.push(piece) for piece in ("a", "b\n", "\nUs", "x", "\nUser", ":z", "more")] == [
        *("a", "b", "\n", "\nUsx", "", "", "")
    ]
    assert filter_.found and filter_.flush() == ""


@pytest.fixture(scope="module")
def speaker():
    """A model that babbles, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_bpe([TEXT], 270)
    return LSTM(LSTMConfig(hidden_size=16, num_layers=1, vocab_size=270)).eval(), tokenizer


def free_text(model, tokenizer, prompt, **sampling):
    *_, (made,) = continuations(model, tokenizer, [prompt], SamplingConfig(max_new_tokens=60, **sampling))
    return made


def test_a_row_ends_at_its_own_stop_text_length_or_seed_whatever_is_beside_it(speaker):
    model, tokenizer = speaker
    prompt = tokenizer.encode("def f(")
    whole = free_text(model, tokenizer, prompt, seed=3)
    assert whole.finish_reason == "length" and len(whole.tokens) == 60
    stop = whole.text[20:23]
    rows = [
        SamplingConfig(max_new_tokens=60, seed=3, stop=(stop,)),
        SamplingConfig(max_new_tokens=7, seed=3),
        SamplingConfig(max_new_tokens=60, seed=3, repetition_penalty=50.0),
        SamplingConfig(max_new_tokens=60, seed=4, min_p=1.0),
    ]
    *_, found = continuations(model, tokenizer, [prompt] * 4, rows)
    assert found[0].text == whole.text[: whole.text.index(stop)] and found[0].finish_reason == "stop"
    assert found[0].tokens == whole.tokens[: len(found[0].tokens)] and len(found[0].tokens) < 60
    assert found[1].tokens == whole.tokens[:7] and found[1].finish_reason == "length"
    assert len({*prompt, *found[2].tokens}) == len({*prompt}) + 60, "an id came again"
    assert found[3].tokens == free_text(model, tokenizer, prompt, greedy=True).tokens
    for row, made in zip(rows, found, strict=True):
        *_, (alone,) = continuations(model, tokenizer, [prompt], [row])
        assert alone == made


@torch.no_grad()
def test_a_reply_that_is_cut_leaves_the_state_of_what_was_shown(speaker):
    model, tokenizer = speaker
    turn = tokenizer.encode("x\n")

    def talk(**sampling):
        fresh = Conversation(model, SamplingConfig(max_new_tokens=60, seed=5, **sampling), end_of_document=None)
        fresh.read(turn)
        return fresh

    def assert_has_read(conversation, text):
        """The ids may be cut otherwise where a part of one was shown, but the text is this."""
        known = [tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) for cut in range(len(text) + 1)]
        known += [made[:n] for n in range(61) if tokenizer.decode(made[:n]) == text]
        known += [made[:n] + tokenizer.encode(text[len(tokenizer.decode(made[:n])) :]) for n in range(60)]
        for ids in known:
            other = talk()
            other.read(ids)
            if torch.allclose(other.hidden, conversation.hidden, atol=1e-6):
                assert other.num_tokens == conversation.num_tokens
                assert torch.equal(other.seen, conversation.seen)
                return
        raise AssertionError(f"{text!r} was not read")

    whole = talk()
    made = list(whole.reply())
    pieces = list(talk().reply_text(tokenizer, turn))
    assert "".join(pieces) == tokenizer.decode(made) and "" in pieces, "a character of several tokens is held back"
    for count in (1, 7, pieces.index("") + 1, 30):
        cut = talk()
        reply = cut.reply_text(tokenizer, turn)
        said = "".join(next(reply) for _ in range(count))
        reply.close()
        assert said == "".join(pieces[:count])
        assert_has_read(cut, said)
    text = "".join(pieces)
    for start in (5, 12, 23):
        stopped = talk(stop=(text[start : start + 4],))
        said = "".join(stopped.reply_text(tokenizer, turn))
        assert said == text[: text.index(text[start : start + 4])]
        assert_has_read(stopped, said)


def test_tokens_of_bytes_begin_where_their_characters_are():
    """Which of them are characters is known later than they come."""
    tokenizer = train_bpe(["a few words"], 300, allow_smaller=True)
    id_of = {tokenizer.bytes_of(id): id for id in reversed(range(257))}
    for text, wanted in {
        b"ab": [0, 1],
        b"\xc3\xa9a": [0, 0, 1],
        b"\xc3\xc3\xa9a": [0, 1, 1, 2],
        b"\xa9\xa9\xa9a": [0, 1, 2, 3],
        b"a\xe4\xb8\xadb\xf0\x9f\x98\x80": [0, 1, 1, 1, 2, 3, 3, 3, 3],
    }.items():
        writer, found = Writer(tokenizer, [], SamplingConfig(stop=("never",))), []
        for byte in text:
            writer.take(id_of[bytes([byte])])
            found.append(writer.start)
        assert found == wanted, text


def test_bytes_that_a_decoder_joins_begin_where_their_characters_are():
    tokenizer = Tokenizer(KINDS["llama"]().to_str().encode(), source="a test")
    newline, word = tokenizer.id_of("<0x0A>"), tokenizer.encode("a")[-1]
    writer, found = Writer(tokenizer, [word], SamplingConfig()), []
    for id in (newline, newline, newline, word):
        writer.take(id)
        found.append(writer.start)
    assert found == [0, 1, 2, 3]
