"""Fitting and calibrating the heads of a checkpoint: what `lfm medical fit` and `lfm medical calibrate` do."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lfm.errors import UserError
from lfm.medical.answering import Answered
from lfm.medical.calibration import (
    Certificate,
    Scaling,
    certify,
    check_size,
    one_of_each,
    scaling,
    thresholds_to_test,
)
from lfm.medical.features import Features
from lfm.medical.head import UncertaintyHead, config_for, fit
from lfm.medical.questions import Part, Question, QuestionSet, share_of
from lfm.medical.stored import (
    HEADS,
    Calibration,
    Cost,
    Data,
    Form,
    HeadName,
    StoredCertificate,
    StoredScaling,
    TaskHeads,
    group_hash,
    today,
)
from lfm.models.language_model import FamilyConfig

_CERTIFICATE_SEED = 0
_MOST_ENDINGS = 8


@dataclass(frozen=True)
class Halves:
    """Places in the calibration questions: the scaling and the thresholds to test come from one half of the groups,
    the test from the other, one question a group."""

    scaling: np.ndarray
    thresholds: np.ndarray
    """Of `scaling` one a group, as those are that are tested: large groups would choose the first thresholds."""
    certificate: np.ndarray
    """One a group."""
    all_of_certificate: np.ndarray


def halves(groups: Sequence[str]) -> Halves:
    is_first = np.array([share_of(f"temperature {group}") < 0.5 for group in groups], dtype=bool)
    second = np.flatnonzero(~is_first)
    first = np.flatnonzero(is_first)

    def one_a_group(places: np.ndarray) -> np.ndarray:
        return (
            places[one_of_each([groups[int(place)] for place in places], _CERTIFICATE_SEED)] if len(places) else places
        )

    return Halves(first, one_a_group(first), one_a_group(second), second)


def group_names(questions: Sequence[Question]) -> list[str]:
    """Of several sets, whose groups have nothing to do with each other."""
    return [f"{question.source}: {question.group}" for question in questions]


def judges_answers(name: str) -> bool:
    """Whether a head reads an answer, not the question alone."""
    return name != "known"


def input_of(name: HeadName, answered: Answered) -> Features:
    return answered.answer if judges_answers(name) else answered.question


def fit_heads(answered: Answered, questions: Sequence[Question], *, seed: int = 0) -> dict[str, UncertaintyHead]:
    """All of `HEADS`; where a family has no recurrent states, the one without them is left out, as it is the first."""
    groups = group_names(questions)
    heads: dict[str, UncertaintyHead] = {}
    for name in HEADS:
        features = input_of(name, answered)
        if name == "correct_without_liquid" and not features.liquid.shape[1]:
            continue
        config = config_for(features, with_liquid=name != "correct_without_liquid")
        heads[name] = fit(features, answered.right, groups, config, seed=seed)
    return heads


def fitted(heads: dict[str, UncertaintyHead], answered: Answered, found: QuestionSet, model: FamilyConfig) -> TaskHeads:
    return TaskHeads(
        heads={name: heads[name].config.model_dump() for name in HEADS if name in heads},
        fit=data_of("fit", found, answered.right),
        cost=cost_of(heads["correct"], answered, model),
    )


def cost_of(head: UncertaintyHead, answered: Answered, model: FamilyConfig) -> Cost:
    """The backbone's forward FLOPs are a third of a training step's; attention is counted for answers of this length.
    Options that were only scored are left out, which would make the share smaller."""
    tokens = answered.num_tokens / max(1, len(answered))
    backbone = model.flops_per_token(attended=(tokens + 1) / 2) / 3 * tokens
    return Cost(head=float(head.config.flops), backbone=backbone, share=head.config.flops / backbone)


def data_of(part: Part, found: QuestionSet, right: np.ndarray) -> Data:
    questions = found.parts[part]
    names = set(group_names(questions))
    return Data(
        sources=sorted({question.source for question in questions}),
        sha256=found.digest(part),
        questions=len(questions),
        groups=len(names),
        accuracy=float(right.mean()),
        date=today(),
        group_hashes=base64.b64encode(b"".join(sorted(map(group_hash, names)))).decode(),
    )


def check_apart(questions: Sequence[Question], part: str, *others: tuple[Part, Data]) -> None:
    """Raises UserError where questions are of groups that something was learnt from, of which it knows the answers.

    One preparation of a set keeps its parts apart; two do not.
    """
    names = group_names(questions)
    for other, data in others:
        if shared := data.shared_with(names):
            raise UserError(
                f"{len(shared):,} of {len(set(names)):,} groups of the {part} part were in the {other} part of "
                f"{data.date} ({shared[0]!r} first): the sets were prepared or divided in another way then; give "
                "those, or fit and calibrate on these"
            )


def calibrated(
    heads: dict[str, UncertaintyHead], answered: Answered, found: QuestionSet, *, risk: float, delta: float
) -> Calibration:
    """Raises UserError for too few groups, and for answers that are all right or all wrong."""
    groups, right = group_names(found.parts["calibration"]), answered.right
    half = halves(groups)
    check_size(len(half.certificate), risk=risk, delta=delta, source="the calibration part")
    of_scaling = right[half.scaling]
    if not len(of_scaling) or of_scaling.all() or not of_scaling.any():
        what = "right" if len(of_scaling) and of_scaling.all() else "wrong"
        raise UserError(f"all answers of the calibration part are {what}: no scaling fits them; give other data")
    logits = {name: head.logits(input_of(name, answered)) for name, head in heads.items() if name in HEADS}
    sums = answered.log_probability
    scalings = scalings_of(logits, right, sums, half)
    probabilities = scalings["correct"].probabilities(logits["correct"], sums)
    certificate = certificate_of(probabilities, right, half, risk=risk, delta=delta)
    return Calibration(
        data=data_of("calibration", found, right),
        form=form_of(found.parts["calibration"], has_options=bool(len(answered.options[0]))),
        scalings={name: StoredScaling(**vars(own)) for name, own in scalings.items()},  # pyright: ignore[reportArgumentType]
        certificate=StoredCertificate(**certificate.record()),
    )


def scalings_of(
    logits: Mapping[str, np.ndarray], right: np.ndarray, log_probability: np.ndarray, half: Halves
) -> dict[str, Scaling]:
    """By head, of logits `[n]` and answers of the whole calibration part; that at the question weighs no answer."""
    places = half.scaling
    return {
        head: scaling(z[places], right[places], log_probability[places] if judges_answers(head) else None)
        for head, z in logits.items()
    }


def form_of(questions: Sequence[Question], *, has_options: bool) -> Form:
    by_source: dict[str, set[tuple[str, ...]]] = {}
    for question in questions if has_options else ():
        by_source.setdefault(question.source, set()).add(question.options)
    shared = [sorted(option.strip() for option in next(iter(of))) for of in by_source.values() if len(of) == 1]
    counts = [len(question.options) if has_options else 0 for question in questions]
    endings = {question.text.rpartition("\n")[2].strip() if "\n" in question.text else "" for question in questions}
    return Form(
        options=shared,
        has_others=not has_options or len(shared) < len(by_source),
        fewest_options=min(counts),
        most_options=max(counts),
        endings=sorted(endings) if len(endings) <= _MOST_ENDINGS and "" not in endings else [],
    )


def certificate_of(
    probabilities: np.ndarray, right: np.ndarray, half: Halves, *, risk: float, delta: float
) -> Certificate:
    tested = half.certificate
    thresholds = thresholds_to_test(probabilities[half.thresholds], questions=len(tested), risk=risk, delta=delta)
    return certify(probabilities[tested], right[tested], thresholds, risk=risk, delta=delta)
