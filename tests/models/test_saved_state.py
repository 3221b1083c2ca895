"""A conversation's state on disk: whole and of this model, or one sentence."""

import hashlib
import io
import os
import random
import re
import zipfile

import pytest
import torch

from lfm.errors import NonFiniteError, UserError
from lfm.inference.conversation import Conversation
from lfm.inference.sampling import SamplingConfig, choose, generate
from lfm.models.initialization import initialize
from lfm.models.liquidlm import LiquidLM, LiquidLMConfig

CONFIG = LiquidLMConfig(hidden_size=16, num_layers=1, reservoir_size=32, vocab_size=50, seq_length=32)


def talk():
    torch.manual_seed(0)
    model = LiquidLM(CONFIG)
    initialize(model, 0)
    return Conversation(model.eval(), SamplingConfig(max_new_tokens=3), end_of_document=None)


@pytest.fixture
def saved(tmp_path):
    spoken = talk()
    spoken.read([3, 1, 4])
    spoken.save(tmp_path / "state", checkpoint="a")
    return tmp_path / "state"


def content_of(file):
    return torch.load(io.BytesIO(file.read_bytes().split(b"\n", 2)[2]), weights_only=True)


def write(file, content):
    """As somebody does who knows how a state is made."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    file.write_bytes(b"lfm state 2\n" + digest + b"\n" + buffer.getvalue())


def assert_refused(file, words):
    reader = talk()
    with pytest.raises(UserError, match=words) as found:
        reader.load(file, checkpoint="a")
    assert str(file) in str(found.value) and reader.state is None and reader.num_tokens == 0


def test_no_flipped_bit_of_a_saved_state_is_used(saved):
    good = saved.read_bytes()
    choose_place = random.Random(0)
    for _ in range(200):
        content = bytearray(good)
        content[choose_place.randrange(len(good))] ^= 1 << choose_place.randrange(8)
        saved.write_bytes(content)
        assert_refused(saved, "is damaged: its checksum|is not a saved state")


def changed(content, key, value):
    return {**content, key: value}


def of_state(name, change):
    return lambda content: {**content, "state": {**content["state"], name: change(content["state"][name])}}


WRONG = {
    "negative_tokens": (lambda c: changed(c, "num_tokens", -3), "is not a saved state"),
    "tokens_of_a_tensor": (lambda c: changed(c, "num_tokens", torch.ones(2)), "is not a saved state"),
    "no_tokens": (lambda c: {key: c[key] for key in c if key != "num_tokens"}, "is not a saved state"),
    "hidden_of_another_shape": (lambda c: changed(c, "hidden", torch.zeros(1, 17)), r"hidden has shape \[1, 17\], not"),
    "hidden_of_two": (lambda c: changed(c, "hidden", torch.zeros(2, 16)), "hidden has shape"),
    "hidden_that_is_none": (lambda c: changed(c, "hidden", [0.0] * 16), "hidden is missing"),
    "complex_hidden": (
        lambda c: changed(c, "hidden", torch.zeros(1, 16, dtype=torch.complex64)),
        "hidden is of torch.c",
    ),
    "sparse_hidden": (lambda c: changed(c, "hidden", torch.zeros(1, 16).to_sparse()), "hidden is of"),
    "nan": (of_state("h", lambda h: h * torch.nan), "h is not finite"),
    "infinite": (of_state("c", lambda c: c + torch.inf), "c is not finite"),
    "complex": (of_state("h", lambda h: h + 0j), "h is of torch.complex"),
    "integers": (of_state("h", lambda h: h.long()), "h is of torch.int64, not"),
    "a_batch": (of_state("h", lambda h: torch.cat([h, h])), "h has shape"),
    "negative_position": (of_state("position", lambda p: p - 9), "position is a negative count"),
    "a_position_between": (of_state("position", lambda p: p + 0.5), "position is of torch.float32, not"),
    "another_tensor": (lambda c: changed(c, "state", {**c["state"], "x": torch.ones(1)}), "x is of no state of this"),
    "an_id_beyond": (lambda c: changed(c, "seen", torch.tensor([50])), "seen has ids beyond the vocabulary of 50"),
    "an_id_below": (lambda c: changed(c, "seen", torch.tensor([-1])), "seen has ids beyond"),
    "ids_that_are_none": (lambda c: changed(c, "seen", torch.ones(2)), "seen is no list of ids"),
    "no_state": (lambda c: changed(c, "state", 3), "is not a saved state"),
    "a_list": (lambda c: [c], "is not a saved state"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_this_model_cannot_have_is_refused(case, saved):
    change, words = WRONG[case]
    write(saved, change(content_of(saved)))
    assert_refused(saved, words)


def test_what_was_read_is_penalized_in_the_next_session_too(saved):
    def read(file):
        reader = talk()
        reader.sampling = SamplingConfig(max_new_tokens=40, repetition_penalty=100.0, greedy=True)
        reader.load(file, checkpoint="a")
        return reader

    assert not {3, 1, 4} & set(read(saved).reply())
    write(saved, {key: value for key, value in content_of(saved).items() if key != "seen"})  # as it was once written
    assert not read(saved).seen.any()


def test_a_state_of_an_earlier_version_is_named(saved):
    buffer = io.BytesIO()
    torch.save(content_of(saved), buffer)
    saved.write_bytes(buffer.getvalue())
    assert_refused(saved, "was saved without a checksum, by an earlier version; give another file")


class Call:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return os.mkdir, self.arguments


def test_a_state_that_calls_anything_is_refused_and_not_run(saved, tmp_path):
    write(saved, changed(content_of(saved), "state", Call(str(tmp_path / "mark"))))
    assert_refused(saved, "is not a saved state")
    assert not (tmp_path / "mark").exists()


def test_a_state_that_grows_when_it_is_unpacked_is_refused(saved):
    content, stored, packed = content_of(saved), io.BytesIO(), io.BytesIO()
    content["hidden"] = torch.zeros(1_000_000)[:16][None]  # of the right shape, with all its storage
    torch.save(content, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    digest = hashlib.sha256(packed.getvalue()).hexdigest().encode()
    saved.write_bytes(b"lfm state 2\n" + digest + b"\n" + packed.getvalue())
    assert_refused(saved, "is not a saved state")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").write_bytes(b"")
    for file in (tmp_path / "fifo", tmp_path / "loop", tmp_path, tmp_path / "absent", tmp_path / "empty"):
        assert_refused(file, re.escape(str(file)))


def test_a_state_that_is_a_link_stays_one(saved, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(saved)
    reader = talk()
    reader.load(link, checkpoint="a")
    reader.read([5])
    reader.save(link, checkpoint="a")
    assert link.is_symlink()
    reader.load(saved, checkpoint="a")
    assert reader.num_tokens == 4


@pytest.mark.parametrize("greedy", [True, False])
def test_weights_that_are_not_finite_say_so_and_no_text(greedy):
    model = talk().model
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="the model's logits are not finite"):
        next(generate(model, [[3]], SamplingConfig(greedy=greedy), end_of_document=0))
    with pytest.raises(NonFiniteError):
        choose(torch.tensor([0.0, torch.inf]), SamplingConfig(greedy=greedy), torch.Generator())
    masked = torch.tensor([0.0, -torch.inf])
    assert choose(masked, SamplingConfig(greedy=greedy), torch.Generator()) == 0
