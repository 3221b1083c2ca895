"""Does plasticity learn a new word while it reads?  The four-way probe of MiniLiquidGPT, over many made-up words.

A short text says in several ways that an invented word means, say, sunset.  Afterwards the model reads `WORD is the`,
and the probability of the words of that meaning is compared with that under three controls.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.models.generation import prefill
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
"""What a made-up word is said to mean -> the words whose probability counts."""

TEXT = (
    "{word} means {meaning}. The {meaning} is called {word}. When people say {word}, they speak of the {meaning}. "
    "{word} is the {meaning}. Every {word} is a {meaning}, and every {meaning} is a {word}. "
)
PROBE = "{word} is the"

CONDITIONS = ("no text", "text, plasticity off", "text, plasticity on", "traces alone")
"""traces alone: text with plasticity on, then the hidden state is cleared and the traces are kept."""


@dataclass(frozen=True)
class Probe:
    """One made-up word: mean probability of the target words' first tokens, by condition."""

    word: str
    meaning: str
    probability: tuple[float, float, float, float]


@dataclass(frozen=True)
class Comparison:
    """One condition against its control, over all words: mean difference with its 95% bootstrap interval."""

    condition: str
    control: str
    mean: float
    control_mean: float
    difference: float
    interval: tuple[float, float]

    @property
    def relative_gain(self) -> float:
        return self.difference / self.control_mean

    @property
    def learnt(self) -> bool:
        """More than 5% better than the control, and surely better."""
        return self.relative_gain > 0.05 and self.interval[0] > 0

    def sentence(self) -> str:
        low, high = self.interval
        return (
            f"{self.condition} against {self.control}: {self.mean:.3e} against {self.control_mean:.3e}, "
            f"{self.relative_gain:+.1%}, difference {self.difference:+.2e} (95% {low:+.2e} to {high:+.2e}): "
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
    targets = target_ids(tokenizer, meaning)
    text = tokenizer.encode(TEXT.format(word=word, meaning=meaning))
    question = tokenizer.encode(PROBE.format(word=word))

    def read(ids: Sequence[int], state: LiquidNNState | None, mode: str) -> tuple[float, Any]:
        with model.evaluating(mode):
            hidden, state = prefill(model, ids, state)
        return float(model.logits(hidden)[0].float().softmax(-1)[targets].mean()), state

    nothing, _ = read(question, None, "plasticity_off")
    _, off = read(text, None, "plasticity_off")
    _, on = read(text, None, "plasticity_on")
    return Probe(
        word,
        meaning,
        (
            nothing,
            read(question, off, "plasticity_off")[0],
            read(question, on, "plasticity_on")[0],
            read(question, reset_hidden(on), "plasticity_on")[0],
        ),
    )


def probes(model: LanguageModel, tokenizer: Tokenizer, *, num_words: int, seed: int) -> list[Probe]:
    """`num_words` random words, meanings in turn.  Raises UserError for a model without plasticity."""
    if not isinstance(model, MiniLiquidGPT):
        raise UserError(f"model.kind={model.config.kind} has no plasticity; give a checkpoint of kind liquidnn")
    generator = random.Random(seed)
    meanings = list(MEANINGS)
    return [probe(model, tokenizer, made_up_word(generator), meanings[i % len(meanings)]) for i in range(num_words)]


def compare(found: Sequence[Probe], *, seed: int, resamples: int = 4000) -> list[Comparison]:
    """Text on against off, and traces alone against nothing: paired over words, percentile bootstrap over words."""
    generator, comparisons = random.Random(seed), []
    for condition, control in ((2, 1), (3, 0)):
        pairs = [(p.probability[condition], p.probability[control]) for p in found]
        differences = [a - b for a, b in pairs]
        means = sorted(statistics.fmean(generator.choices(differences, k=len(pairs))) for _ in range(resamples))
        comparisons.append(
            Comparison(
                CONDITIONS[condition],
                CONDITIONS[control],
                statistics.fmean(a for a, _ in pairs),
                statistics.fmean(b for _, b in pairs),
                statistics.fmean(differences),
                (means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]),
            )
        )
    return comparisons


def record(found: Sequence[Probe], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What plasticity.json holds."""
    return {
        "conditions": CONDITIONS,
        "comparisons": [asdict(c) | {"relative_gain": c.relative_gain, "learnt": c.learnt} for c in comparisons],
        "words": [asdict(p) for p in found],
    }


def plot(found: Sequence[Probe], path: Path) -> None:
    """Mean probability by condition with its 95% interval (normal), and every word as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for index, name in enumerate(CONDITIONS):
        values = [p.probability[index] for p in found]
        error = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        jitter = random.Random(index)
        axes.scatter([index + jitter.uniform(-0.2, 0.2) for _ in values], values, s=8, alpha=0.35, color="#2f6db5")
        axes.errorbar(index, statistics.fmean(values), yerr=error, fmt="o", capsize=5, color="black", label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(CONDITIONS)), CONDITIONS)
    axes.set_ylabel("mean probability of the meaning's words")
    axes.set_title(f"{len(found)} made-up words; bars: 95% of the mean", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
