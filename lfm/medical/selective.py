"""To answer with a probability, or to abstain with a reason and a referral."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lfm.errors import NonFiniteError, UserError
from lfm.medical.calibration import Certificate, Scaling
from lfm.medical.config import MedicalConfig
from lfm.medical.features import SCALARS, Features
from lfm.medical.head import UncertaintyHead

REFERRAL = "I do not answer this. Please ask a qualified professional."
"""Always this sentence, so that what reads it can tell."""

NO_DEVICE = (
    "This is not a medical device. The guarantee is for questions exchangeable with those of the calibration, and void "
    "for others."
)


@dataclass(frozen=True)
class Decision:
    """Whether an answer is given."""

    answered: bool
    probability: float
    """Calibrated, that the answer is right."""
    known: float | None
    """The same, judged at the end of the question, before an answer was made; None where no head does."""
    threshold: float | None
    """The stricter of the two below; None: nothing is answered."""
    safety_threshold: float
    certified_threshold: float | None
    reason: str
    """Why not; empty where it is answered."""

    def record(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Calibrated:
    """Heads of one checkpoint and kind of answer, with what they were calibrated on."""

    head: UncertaintyHead
    scaling: Scaling
    certificate: Certificate
    known_head: UncertaintyHead | None
    known_scaling: Scaling | None
    calibrated_on: str
    """In words: sets, number of questions, date."""
    form: Any
    """How those questions were asked: `lfm.medical.stored.Form`."""

    def as_calibrated(self, prompt: str) -> str:
        """The prompt with the last line that all questions of the calibration had, if it has not."""
        endings = self.form.endings
        return f"{prompt}\n{endings[0]}" if len(endings) == 1 and not _ends(prompt, endings) else prompt

    def other_form(self, prompt: str, options: Sequence[str]) -> str | None:
        """Why a question is none of those that the calibration is about, as far as its form tells."""
        form = self.form
        if options and not form.has_others and sorted(option.strip() for option in options) not in form.options:
            return "its options are none that were calibrated; give all of those"
        if options and form.most_options and not form.fewest_options <= len(options) <= form.most_options:
            fewest, most = form.fewest_options, form.most_options
            calibrated = str(most) if fewest == most else f"{fewest} to {most}"
            return f"it has {len(options)} options, and questions of the calibration have {calibrated}"
        if form.endings and not _ends(prompt, form.endings):
            return (
                f"it does not end as questions of the calibration do, in a line {' or '.join(map(repr, form.endings))}"
            )
        return None

    def probabilities(self, answer: Features) -> Any:
        """That each answer is right; float64 `[n]`."""
        return self.scaling.probabilities(self.head.logits(answer), _sums(answer))

    def known_probabilities(self, question: Features) -> Any:
        if self.known_head is None or self.known_scaling is None:
            return [None] * len(question)
        return self.known_scaling.probabilities(self.known_head.logits(question), _sums(question))

    def decide(self, question: Features, answer: Features, medical: MedicalConfig) -> list[Decision]:
        """Raises NonFiniteError where a probability is none: nothing is answered by it."""
        for features in (question, answer):
            if not all(torch.isfinite(part).all() for part in (features.hidden, features.liquid, features.scalars)):
                raise NonFiniteError("the model's hidden states are not finite, and no answer can be judged by them")
        for head, features in ((self.head, answer), (self.known_head, question)):
            if head is not None and not head.reads(features):
                raise UserError("the stored head reads states of other sizes than this model has; fit it again")
        given, known = self.probabilities(answer), self.known_probabilities(question)
        if not all(math.isfinite(p) for p in given):
            raise NonFiniteError("the head's probabilities are not finite, and no answer can be judged by them")
        outside = self.head.outside(answer)
        return [
            self._decide(float(p), None if k is None else float(k), medical, is_outside=bool(o))
            for p, k, o in zip(given, known, outside, strict=True)
        ]

    def _decide(self, probability: float, known: float | None, medical: MedicalConfig, *, is_outside: bool) -> Decision:
        certified, asked = self.certificate.threshold, medical.safety_threshold
        threshold = None if certified is None else max(certified, asked)
        answered = threshold is not None and probability >= threshold and not is_outside
        reason = ""
        if threshold is None:
            reason = f"no threshold could be certified for a risk of {percent(self.certificate.risk)}"
        elif is_outside:
            reason = "the model finds it less likely than all answers that the head was fitted on"
        elif not answered:
            which = "certified" if certified is not None and certified > asked else "safety"
            reason = (
                f"the probability of being right is {_at_least(probability)}, below the {which} threshold "
                f"{_at_most(threshold)}"
            )
        return Decision(answered, probability, known, threshold, asked, certified, reason)

    def words(self, medical: MedicalConfig) -> list[str]:
        """What both thresholds are, and what they rest on."""
        c = self.certificate
        certified = "none: nothing is answered" if c.threshold is None else f"{c.threshold:.3f}"
        return [
            f"medical mode: safety threshold {medical.safety_threshold:g}, certified threshold {certified} (risk at "
            f"most {percent(c.risk)} with confidence {percent(1 - c.delta)}, on {c.questions:,} questions); the "
            "stricter applies",
            f"calibrated on {self.calibrated_on}. {NO_DEVICE}",
        ]


def _sums(features: Features) -> np.ndarray:
    """Log-probabilities of the answers, summed over tokens; float64 `[n]`."""
    return features.scalars[:, SCALARS.index("log_probability")].double().numpy()


def percent(share: float) -> str:
    """Not rounded to what it is not."""
    return f"{100 * share:.10g}%"


def _at_least(share: float) -> str:
    """Two digits, rounded down: 1.00 is said of nothing."""
    return f"{min(99, math.floor(100 * share + 1e-9)) / 100:.2f}"


def _at_most(share: float) -> str:
    return f"{math.ceil(100 * share - 1e-9) / 100:.2f}"


def _ends(prompt: str, endings: Sequence[str]) -> bool:
    return prompt.rpartition("\n")[2].strip() in endings


def said(answer: str, decision: Decision) -> str:
    """What is shown for an answer."""
    if decision.answered:
        return f"{answer} [probability of being right {_at_least(decision.probability)}]"
    return f"{REFERRAL} ({decision.reason})"
