"""The probes: answers are right, only they are labels, and the counted accuracy is that of the model's own choices."""

import itertools

import numpy as np
import pytest
import torch

from lfm.data.stream import DataConfig, open_training, open_validation
from lfm.errors import UserError
from lfm.experiments import probes
from lfm.experiments.probes import (
    LONGER_SEQ_LENGTH,
    LONGER_SIZES,
    PROBES,
    SEQ_LENGTH,
    SIZES,
    VOCAB_SIZE,
    accuracy,
    documents,
    write_data,
)
from lfm.models.liquidnet import LiquidNetConfig
from lfm.models.registry import build


def answers_of(probe: str, ids: list[int]) -> tuple[int, list[int]]:
    """Size and answers of a document, worked out from its items one by one."""
    p = probes
    if probe in ("recall", "copy"):
        mark = ids.index(p._MARK)
        items, asked = ids[:mark], ids[mark + 1 : -1]
        if probe == "copy":
            return mark, items
        memory = dict(zip(items[::2], items[1::2], strict=True))
        assert len(memory) == mark // 2, "no key comes twice"
        return mark // 2, [memory[key] for key in asked[::2]]
    *items, question, _, _ = ids
    if probe == "parity":
        return len(items), [p._PARITIES + sum(item - p._BITS for item in items) % 2]
    places = list(range(5))
    for item in items:
        i, j = p._PAIRS[item - p._SWAPS]
        places[i], places[j] = places[j], places[i]
    return len(items), [p._THINGS + places[question - p._PLACES]]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("sizes", [SIZES, LONGER_SIZES])
def test_answers_are_right_and_nothing_else_is_asked(probe, sizes):
    seen = set()
    for ids, is_answer in itertools.islice(documents(probe, 3, sizes), 400):
        size, answers = answers_of(probe, ids.tolist())
        assert ids[is_answer].tolist() == answers and ids[-1] == 0 and not is_answer[-1]
        assert ids.min() >= 0 and ids.max() < VOCAB_SIZE
        seen.add(size)
    assert (min(seen), max(seen)) == sizes


def test_a_seed_is_a_data_set():
    one, same, other = (
        [ids.tolist() for ids, _ in itertools.islice(documents("s5", s, (2, 5)), 50)] for s in (1, 1, 2)
    )
    assert one == same != other


def test_most_documents_of_a_training_are_small():
    drawn = documents("copy", 1, SIZES, mostly_small=True)
    sizes = np.array([(len(ids) - 2) // 2 for ids, _ in itertools.islice(drawn, 4000)])
    for size in (1, 2, 4):
        expected = 1 / size / (1 / np.arange(SIZES[0], SIZES[1] + 1)).sum()
        assert abs((sizes == size).mean() - expected) < 0.03


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes") / "recall"
    write_data("recall", folder, train_rows=40, seed=5)
    return folder


@pytest.mark.parametrize("rows, seed", [(41, 5), (40, 6)])
def test_rows_of_another_set_are_not_taken_for_its_own(data, rows, seed):
    write_data("recall", data, train_rows=40, seed=5)
    with pytest.raises(UserError, match=r"holds rows of other probes\.steps or another first seed; remove it, and the"):
        write_data("recall", data, train_rows=rows, seed=seed)


def test_rows_are_ordinary_ones_with_answers_as_labels(data):
    config = DataConfig(path=str(data))
    train = open_training(config, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=4)
    [held_out] = open_validation(config, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE).values()
    longer = DataConfig(path=str(data / "longer"))
    [long_rows] = open_validation(longer, seq_length=LONGER_SEQ_LENGTH, vocab_size=VOCAB_SIZE).values()
    assert len(train) == 40
    for rows in (train, held_out, long_rows):
        batch = rows.read(range(8))
        labels = 0
        for ids, lengths in zip(batch.ids.tolist(), batch.lengths, strict=True):
            whole = [n for n in lengths if n > 1]
            assert len(lengths) - len(whole) == sum(lengths) - sum(whole), "padding is pieces of one id"
            ends = list(itertools.accumulate(whole))
            labels += sum(len(answers_of("recall", ids[end - n : end])[1]) for n, end in zip(whole, ends, strict=True))
        assert batch.to("cpu").documents.num_labels == labels
        assert rows.index.num_tokens + rows.index.num_padding == len(rows) * rows.index.seq_length
    assert not torch.equal(train.read([0]).ids, held_out.read([0]).ids)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    write_data("recall", data, train_rows=40, seed=5)
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}, "what is there stays"


def test_accuracy_counts_the_models_own_choices(data):
    model = build(LiquidNetConfig(hidden_size=16, num_layers=1, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE))
    [rows] = open_validation(DataConfig(path=str(data)), seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE).values()
    found = accuracy(model, rows)
    right = asked = 0
    for row in range(len(rows)):
        batch = rows.read([row])
        logits, _ = model(batch.ids, doc_lengths=batch.lengths)
        begins = np.cumsum([0, *batch.lengths[0]])
        assert batch.label_mask is not None
        for at in np.flatnonzero(batch.label_mask[0].numpy()):
            assert at not in begins
            right += int(logits[0, at - 1].argmax() == batch.ids[0, at])
            asked += 1
    assert found == right / asked
