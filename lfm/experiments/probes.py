"""Sequences that ask for one ability: recall by association, copying, and a state that is tracked.

Each document is `size` items and one answer or more, ids of one small vocabulary; only answers are labels.

    recall   k1 v1 k2 v2 ... | kj vj ki vi ...   every key again, in another order: which value came with it?
    copy     a b c ... | a b c ...               the same again
    parity   0 1 1 0 ... ? even                  how many ones, modulo 2
    s5       (1 3) (2 5) ... ?4 2                 five things change places in pairs: which one is in place 4?

One attention layer after another can look keys up and copy (Arora et al. 2023, arXiv 2312.04927).  Parity and the
permutations of five things need a state that changes with every item: attention and diagonal linear recurrences of a
fixed depth cannot track the latter at every length, unless TC0 = NC1, and a nonlinear recurrence can (Merrill et al.
2024, arXiv 2404.08819).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lfm.data.format import TOKENIZER_NAME, RowWriter, Split
from lfm.data.reader import RowReader
from lfm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from lfm.errors import UserError
from lfm.files import exists, partial_folder, read_file, replace_folder, shown
from lfm.layers.documents import IGNORED_LABEL
from lfm.models.language_model import LanguageModel

Probe = Literal["recall", "copy", "parity", "s5"]
PROBES: tuple[Probe, ...] = ("recall", "copy", "parity", "s5")
CHANCE = {"recall": 1 / 64, "copy": 1 / 64, "parity": 1 / 2, "s5": 1 / 5}
"""Share of right answers of somebody who knows the form alone."""

SIZES, LONGER_SIZES = (1, 24), (25, 60)
"""Least and most items of a document, in training and where longer ones are asked for."""
SEQ_LENGTH, LONGER_SEQ_LENGTH = 128, 256
VOCAB_SIZE = 256
TEST_ROWS = 256
_EOD, _MARK, _SYMBOLS = 0, 1, 64
_KEYS, _VALUES, _SWAPS, _PLACES, _THINGS, _BITS, _PARITIES = 10, 80, 150, 170, 180, 190, 200
"""Where each kind of id begins."""
_PAIRS = np.array([(i, j) for i in range(5) for j in range(i)])

_AT_ONCE = 4096
"""Documents that are drawn together."""

Documents = tuple[np.ndarray, np.ndarray]
"""Ids `[n, length]` of documents of one size, and which of them are answers."""


def _recall(draws: np.random.Generator, n: int, size: int) -> Documents:
    keys = draws.random((n, _SYMBOLS)).argsort(1)[:, :size]
    values = draws.integers(0, _SYMBOLS, (n, size))
    asked = draws.random((n, size)).argsort(1)
    pairs = np.stack([keys + _KEYS, values + _VALUES], axis=2)
    again = np.take_along_axis(pairs, asked[:, :, None], axis=1)
    ids = np.concatenate([pairs.reshape(n, -1), np.full((n, 1), _MARK), again.reshape(n, -1)], axis=1)
    answers = np.zeros_like(ids, dtype=bool)
    answers[:, 2 * size + 2 :: 2] = True
    return ids, answers


def _copy(draws: np.random.Generator, n: int, size: int) -> Documents:
    symbols = draws.integers(0, _SYMBOLS, (n, size)) + _VALUES
    ids = np.concatenate([symbols, np.full((n, 1), _MARK), symbols], axis=1)
    answers = np.zeros_like(ids, dtype=bool)
    answers[:, size + 1 :] = True
    return ids, answers


def _parity(draws: np.random.Generator, n: int, size: int) -> Documents:
    bits = draws.integers(0, 2, (n, size))
    return _one_answer(bits + _BITS, np.full(n, _MARK), bits.sum(1) % 2 + _PARITIES)


def _s5(draws: np.random.Generator, n: int, size: int) -> Documents:
    swaps, asked, row = draws.integers(0, len(_PAIRS), (n, size)), draws.integers(0, 5, n), np.arange(n)
    things = np.tile(np.arange(5), (n, 1))
    for step in range(size):
        one, other = _PAIRS[swaps[:, step]].T
        things[row, one], things[row, other] = things[row, other], things[row, one]
    return _one_answer(swaps + _SWAPS, asked + _PLACES, things[row, asked] + _THINGS)


def _one_answer(items: np.ndarray, question: np.ndarray, answer: np.ndarray) -> Documents:
    ids = np.concatenate([items, question[:, None], answer[:, None]], axis=1)
    answers = np.zeros_like(ids, dtype=bool)
    answers[:, -1] = True
    return ids, answers


_GENERATORS: dict[str, Callable[[np.random.Generator, int, int], Documents]] = {
    "recall": _recall,
    "copy": _copy,
    "parity": _parity,
    "s5": _s5,
}


def documents(probe: str, seed: int, sizes: tuple[int, int], *, mostly_small: bool = False) -> Iterator[Documents]:
    """Documents without end, one at a time: ids `[length]` and which are answers, with the end-of-document id behind.

    Sizes are uniform between the two given ones, or `mostly_small`, as often as 1 / size: a state is learnt where it
    has changed little.  Everything is drawn from `seed`.
    """
    draws, possible = np.random.default_rng(seed), np.arange(sizes[0], sizes[1] + 1)
    weights = 1 / possible if mostly_small else np.ones(len(possible))
    while True:
        chosen = draws.choice(possible, _AT_ONCE, p=weights / weights.sum())
        made: dict[int, Iterator[Documents]] = {}
        for size in np.unique(chosen).tolist():
            ids, answers = _GENERATORS[probe](draws, int((chosen == size).sum()), size)
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=_EOD)
            made[size] = iter(zip(ids, np.pad(answers, ((0, 0), (0, 1))), strict=True))
        yield from (next(made[size]) for size in chosen.tolist())


_MADE_OF = "probe.json"
"""In the folder of a probe's rows: what they were drawn by."""


def write_data(probe: str, folder: Path, *, train_rows: int, seed: int) -> None:
    """The data set of a probe, unless it is there: training rows, most of small documents, held-out rows of the same
    sizes, all as often, and `longer`, a data set of larger ones.  Rows are whole documents and padding.

    Raises UserError for a folder that holds others.
    """
    made_of = {"probe": probe, "rows": train_rows, "seed": seed}
    if exists(folder):
        found = json.loads(read_file(folder / _MADE_OF)) if exists(folder / _MADE_OF) else None
        if found != made_of:
            raise UserError(
                f"{shown(folder)} holds rows of other probes.steps or another first seed; remove it, and the runs that "
                f"read them, {shown(folder.parent.parent / probe)}"
            )
        return
    new = partial_folder(folder)
    shutil.rmtree(new, ignore_errors=True)
    tokenizer = _tokenizer()
    for place in (new, new / "longer"):
        place.mkdir(parents=True)
        tokenizer.save(place / TOKENIZER_NAME)
    _write_split(probe, new, "train", train_rows, SEQ_LENGTH, SIZES, (seed, 0))
    _write_split(probe, new, "validation", TEST_ROWS, SEQ_LENGTH, SIZES, (seed, 1))
    _write_split(probe, new / "longer", "validation", TEST_ROWS, LONGER_SEQ_LENGTH, LONGER_SIZES, (seed, 2))
    (new / _MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    replace_folder(folder, by=new)


def _write_split(
    probe: str, folder: Path, split: Split, rows: int, seq_length: int, sizes: tuple[int, int], seed: tuple[int, int]
) -> None:
    writer = RowWriter(
        folder / split,
        seq_length=seq_length,
        vocab_size=VOCAB_SIZE,
        shard_bytes=1 << 26,
        compression=None,
        label_mask=True,
    )
    own_seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    drawn = documents(probe, own_seed, sizes, mostly_small=split == "train")
    waiting, num_documents, num_tokens = next(drawn), 0, 0
    for _ in range(rows):
        ids, mask = np.full(seq_length, _EOD, np.int64), np.zeros(seq_length, bool)
        lengths: list[int] = []
        at = 0
        while at + len(waiting[0]) <= seq_length:
            own = slice(at, at + len(waiting[0]))
            ids[own], mask[own] = waiting
            lengths.append(len(waiting[0]))
            at, waiting = own.stop, next(drawn)
        writer.write(ids, [*lengths, *[1] * (seq_length - at)], label_mask=mask)
        num_documents, num_tokens = num_documents + len(lengths), num_tokens + at
    writer.finish(
        split=split,
        eod_id=_EOD,
        tokenizer_sha256=_tokenizer().sha256,
        num_tokens=num_tokens,
        num_padding=rows * seq_length - num_tokens,
        num_documents=num_documents,
        text_bytes=0,
        packing="best_fit",
    )


def _tokenizer() -> Tokenizer:
    """Every id is a word of its own: t1, t2, ..."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {END_OF_DOCUMENT: _EOD, **{f"t{i}": i for i in range(1, VOCAB_SIZE)}}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=f"t{VOCAB_SIZE - 1}"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(inner.to_str().encode(), source="the vocabulary of the probes")


@torch.no_grad()
def accuracy(model: LanguageModel, rows: RowReader, *, batch_rows: int = 128) -> float:
    """Share of the labels of a split whose id the model finds most likely."""
    model.eval()
    device = model.embedding.weight.device
    right = asked = 0
    for first in range(0, len(rows), batch_rows):
        batch = rows.read(range(first, min(first + batch_rows, len(rows)))).to(device)
        hidden, _ = model.advance(batch.ids, None, batch.documents)
        labels = batch.documents.labels(batch.ids)
        is_label = labels != IGNORED_LABEL
        found = model.logits(hidden[is_label]).argmax(-1)
        right += int((found == labels[is_label]).sum())
        asked += int(is_label.sum())
    return right / asked
