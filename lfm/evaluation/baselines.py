"""What a classifier of texts should beat."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lfm.evaluation.calibration import calibration_error


class LabelledText(Protocol):
    """A text and its class."""

    @property
    def text(self) -> str: ...

    @property
    def label(self) -> str: ...


class Baseline(NamedTuple):
    accuracy: float
    ece: float
    """Expected calibration error in 15 bins of equal width."""


def majority(train: Sequence[LabelledText], held_out: Sequence[LabelledText], labels: Sequence[str]) -> Baseline:
    """Always the commonest label of `train`, as sure of it as it is common there."""
    counts = Counter(row.label for row in train)
    label, count = counts.most_common(1)[0]
    right = np.array([row.label == label for row in held_out])
    return Baseline(float(right.mean()), calibration_error(np.full(len(right), count / len(train)), right))


def naive_bayes(train: Sequence[LabelledText], held_out: Sequence[LabelledText], labels: Sequence[str]) -> Baseline:
    """Multinomial, over lower-case words, one added to each count; words that `train` lacks are left out."""
    class_of = {label: i for i, label in enumerate(labels)}
    place: dict[str, int] = {}
    seen = [(place.setdefault(word, len(place)), class_of[row.label]) for row in train for word in _words(row.text)]
    counts = np.ones((len(place), len(labels)))
    np.add.at(counts, tuple(np.array(seen, np.int64).reshape(-1, 2).T), 1)
    log_likelihood = np.log(counts / counts.sum(axis=0))
    of_class = np.bincount([class_of[row.label] for row in train], minlength=len(labels))
    with np.errstate(divide="ignore"):  # a label that is not in train
        log_prior = np.log(of_class / of_class.sum())
    scores = np.stack(
        [
            log_prior + log_likelihood[[place[word] for word in _words(row.text) if word in place]].sum(axis=0)
            for row in held_out
        ]
    )
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    sureness = probabilities.max(axis=1) / probabilities.sum(axis=1)
    right = scores.argmax(axis=1) == np.array([class_of[row.label] for row in held_out])
    return Baseline(float(right.mean()), calibration_error(sureness, right))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
