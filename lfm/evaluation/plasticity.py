"""Does plasticity learn a new word while it reads?  The four-way probe of MiniLiquidGPT, over many made-up words.

A short text says in several ways that an invented word means, say, sunset.  Afterwards the model reads `WORD is the`.
What counts is how much more probable that made the words of this meaning than those of the seven others, compared
with a control that differs in one thing alone: plasticity any way at all moves the probability of most words.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.inference.sampling import prefill
from lfm.models.language_model import LanguageModel
from lfm.models.liquidnn import LiquidNNState, MiniLiquidGPT, reset_hidden

MEANINGS = {
    "sunset": ("sunset", "sun", "golden", "evening"),
    "river": ("river", "water", "stream", "blue"),
    "winter": ("winter", "snow", "cold", "white"),
    "soldier": ("soldier", "army", "war", "battle"),
    "teacher": ("teacher", "school", "student", "class"),
    "music": ("music", "song", "sound", "band"),
    "doctor": ("doctor", "hospital", "medicine", "patient"),
    "king": ("king", "royal", "crown", "throne"),
}
"""What a made-up word may be said to mean -> the words whose probability counts."""

TEXT = (
    "{word} means {meaning}. The {meaning} is called {word}. When people say {word}, they speak of the {meaning}. "
    "{word} is the {meaning}. Every {word} is a {meaning}, and every {meaning} is a {word}. "
)
PROBE = "{word} is the"

CONDITIONS = ("no text, plasticity on", "text, plasticity off", "text, plasticity on", "traces alone")
"""traces alone: text with plasticity on, then the hidden state is cleared and the traces are kept."""
COMPARISONS = ((2, 1), (3, 0))
"""Condition and control: what plasticity adds to the context, and what the traces keep without it."""
CONFIDENCE = 0.99
"""A random change of a model without any trained plasticity must not pass for learning."""


@dataclass(frozen=True)
class Probe:
    """One made-up word: mean probability of each meaning's words' first tokens, by condition and meaning."""

    word: str
    meaning: str
    probability: tuple[tuple[float, ...], ...]

    def preference(self, condition: int) -> float:
        """ln of the own meaning's probability over the geometric mean of the others'."""
        logs = dict(zip(MEANINGS, map(math.log, self.probability[condition]), strict=True))
        return logs[self.meaning] - statistics.fmean(logs[other] for other in MEANINGS if other != self.meaning)


@dataclass(frozen=True)
class Comparison:
    """One condition against its control: mean of the preference's change, in nats, with its bootstrap interval.

    Words of one meaning share its text and its targets, so the independent units are the meanings.
    """

    condition: str
    control: str
    change: float
    interval: tuple[float, float]
    num_meanings: int

    @property
    def relative_gain(self) -> float:
        return math.expm1(self.change)

    @property
    def learnt(self) -> bool:
        """More than 5% better than the control, and surely better."""
        return self.relative_gain > 0.05 and self.interval[0] > 0

    def sentence(self) -> str:
        low, high = map(math.expm1, self.interval)
        return (
            f"{self.condition} against {self.control}: the word's own meaning over the others "
            f"{self.relative_gain:+.1%} ({CONFIDENCE:.0%}: {low:+.1%} to {high:+.1%}; {self.num_meanings} meanings): "
            f"{'a gain' if self.learnt else 'no sure gain above 5%'}"
        )


def made_up_word(generator: random.Random) -> str:
    """Capital letters, three syllables."""
    return "".join(generator.choice("BDFGKLMNPRSTVZ") + generator.choice("AEIOU") for _ in range(3)) + "X"


def target_ids(tokenizer: Tokenizer, meaning: str) -> list[int]:
    """First token of each target word, with and without a space before it, each id once."""
    texts = [prefix + target for target in MEANINGS[meaning] for prefix in (" ", "")]
    return sorted({tokenizer.encode(text)[0] for text in texts})


@torch.no_grad()
def probe(model: MiniLiquidGPT, tokenizer: Tokenizer, word: str, meaning: str) -> Probe:
    """The four conditions for one word; the model's plasticity is left as it was."""
    targets = [target_ids(tokenizer, of) for of in MEANINGS]
    text = tokenizer.encode(TEXT.format(word=word, meaning=meaning))
    question = tokenizer.encode(PROBE.format(word=word))

    def read(ids: Sequence[int], state: LiquidNNState | None, mode: str) -> tuple[tuple[float, ...], Any]:
        with model.evaluating(mode):
            hidden, state = prefill(model, ids, state)
        # In float64, where no probability is 0.
        probability = model.logits(hidden)[0].double().softmax(-1).cpu()
        return tuple(float(probability[ids].mean()) for ids in targets), state

    _, off = read(text, None, "plasticity_off")
    _, on = read(text, None, "plasticity_on")
    answers = (
        # With plasticity on: the question's own tokens leave traces too.
        read(question, None, "plasticity_on"),
        read(question, off, "plasticity_off"),
        read(question, on, "plasticity_on"),
        read(question, reset_hidden(on), "plasticity_on"),
    )
    return Probe(word, meaning, tuple(answer for answer, _ in answers))


def probes(model: LanguageModel, tokenizer: Tokenizer, *, num_words: int, seed: int) -> list[Probe]:
    """`num_words` random words, meanings in turn.  Raises UserError for a model without plasticity."""
    if not isinstance(model, MiniLiquidGPT):
        raise UserError(f"model.kind={model.config.kind} has no plasticity; give a checkpoint of kind liquidnn")
    generator = random.Random(seed)
    meanings = list(MEANINGS)
    return [probe(model, tokenizer, made_up_word(generator), meanings[i % len(meanings)]) for i in range(num_words)]


def compare(found: Sequence[Probe], *, seed: int, resamples: int = 4000) -> list[Comparison]:
    """Both of COMPARISONS: paired over words, averaged over those of a meaning, percentile bootstrap over meanings."""
    generator, comparisons = random.Random(seed), []
    tail = (1 - CONFIDENCE) / 2
    for condition, control in COMPARISONS:
        by_meaning: dict[str, list[float]] = {}
        for p in found:
            by_meaning.setdefault(p.meaning, []).append(p.preference(condition) - p.preference(control))
        changes = [statistics.fmean(changes) for changes in by_meaning.values()]
        means = sorted(statistics.fmean(generator.choices(changes, k=len(changes))) for _ in range(resamples))
        comparisons.append(
            Comparison(
                CONDITIONS[condition],
                CONDITIONS[control],
                statistics.fmean(changes),
                (means[int(tail * resamples)], means[-1 - int(tail * resamples)]),
                len(changes),
            )
        )
    return comparisons


def record(found: Sequence[Probe], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What plasticity.json holds."""
    return {
        "conditions": CONDITIONS,
        "meanings": list(MEANINGS),
        "confidence": CONFIDENCE,
        "comparisons": [asdict(c) | {"relative_gain": c.relative_gain, "learnt": c.learnt} for c in comparisons],
        "words": [asdict(p) for p in found],
    }


def plot(found: Sequence[Probe], path: Path) -> None:
    """The own meaning's probability over the others', by condition, every word a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for index in range(len(CONDITIONS)):
        values = [math.exp(p.preference(index)) for p in found]
        jitter = random.Random(index)
        axes.scatter([index + jitter.uniform(-0.2, 0.2) for _ in values], values, s=8, alpha=0.35, color="#2f6db5")
        axes.scatter([index], [statistics.geometric_mean(values)], color="black", zorder=3)
    axes.set_yscale("log")
    axes.set_xticks(range(len(CONDITIONS)), CONDITIONS)
    axes.set_ylabel("probability of the own meaning over the others'")
    axes.set_title(f"{len(found)} made-up words and their geometric mean", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
