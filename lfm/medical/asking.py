"""Selective answers to what a user asks: what `generate`, `chat` and the library do in medical mode."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import Continuation
from lfm.medical.answering import FREE_TEXT, Answered, answer
from lfm.medical.config import MedicalConfig
from lfm.medical.grading import graded
from lfm.medical.questions import Question, Task, has_half_a_character
from lfm.medical.selective import NO_DEVICE, REFERRAL, Calibrated, Decision, said
from lfm.medical.stored import open_calibrated
from lfm.models.language_model import LanguageModel


@dataclass(frozen=True)
class Reply:
    prompt: str
    options: tuple[str, ...]
    answer: str | None
    """None: it is withheld."""
    decision: Decision
    made: Continuation | None = None
    """Of a free answer, how it was decoded: how many tokens it has, and why it ended."""

    @property
    def text(self) -> str:
        """What is shown."""
        return said(self.answer or "", self.decision)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "prompt": self.prompt,
            **({"options": list(self.options)} if self.options else {}),
            "answer": self.answer,
            "referral": None if self.decision.answered else REFERRAL,
            **self.decision.record(),
            "note": NO_DEVICE,
        }


class MedicalMode:
    """A model that answers with a calibrated probability or not at all.

    Raises UserError where the mode is on and its heads are missing, changed, of another checkpoint or not calibrated:
    before anything is answered.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, checkpoint: Path, medical: MedicalConfig, tasks: set[Task]
    ) -> None:
        assert medical.mode and tasks
        self.model, self.tokenizer, self.medical = model, tokenizer, medical
        dtype = model.embedding.weight.dtype
        self.calibrated: dict[Task, Calibrated] = {task: open_calibrated(checkpoint, task, dtype) for task in tasks}

    def words(self) -> list[str]:
        """What is said before the first answer."""
        found = []
        for task, calibrated in self.calibrated.items():
            what = "answers chosen from options" if task == "choice" else "free answers, decoded greedily"
            first, *rest = calibrated.words(self.medical)
            found += [f"{first}; {what}", *rest]
        return found

    def ask(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[Reply]:
        """Each prompt by itself; without options its answer is free, to the end of its line.

        Raises UserError for an empty prompt, a single option or an empty one.
        """
        for prompt, given in zip(prompts, options, strict=True):
            if (
                not isinstance(prompt, str)
                or isinstance(given, str)
                or not all(isinstance(text, str) for text in given)
            ):
                raise UserError(f"prompt {prompt!r} with options {given!r}: give a text, and a list of texts")
        replies: dict[int, Reply] = {}
        for task in ("choice", "text"):
            places = [i for i, given in enumerate(options) if bool(given) == (task == "choice")]
            if not places:
                continue
            calibrated = self.calibrated[task]
            questions = [self._question(prompts[i], options[i], calibrated) for i in places]
            answered: Answered = answer(self.model, self.tokenizer, questions, task)
            decisions = calibrated.decide(answered.question, answered.answer, self.medical)
            for place, (i, text, decision) in enumerate(zip(places, answered.answers, decisions, strict=True)):
                if not graded(text):  # which no grader calls right
                    decision = replace(decision, answered=False, reason="the model made no answer")
                other = calibrated.other_form(questions[place].text, options[i])
                if other is not None:
                    decision = replace(decision, answered=False, reason=other)
                given = text if decision.answered else None
                made = answered.made[place] if answered.made else None
                replies[i] = Reply(prompts[i], tuple(options[i]), given, decision, made)
        return [replies[i] for i in range(len(prompts))]

    def _question(self, prompt: str, options: Sequence[str], calibrated: Calibrated) -> Question:
        check_options(options)
        prompt = calibrated.as_calibrated(prompt) if prompt.strip() else prompt
        spaced = tuple(f" {option.strip()}" for option in options)  # as those of the calibration
        # The right one is not known: whether it was right is not looked at.
        return Question(prompt, spaced or ("",), 0, group="", source="", specialty="", kind="")


def check_options(options: Sequence[str]) -> None:
    """Raise UserError for options of which none can be chosen from others."""
    if any(not option.strip() for option in options):
        raise UserError("an option is empty; give each a text")
    if broken := [option for option in options if has_half_a_character(option)]:
        raise UserError(f"option {broken[0]!r} has half a character, which is no text; give it another")
    different = {option.strip() for option in options}
    if options and len(different) < 2:
        raise UserError(f"options {', '.join(map(repr, options))} leave nothing to choose; give two or more")
    if len(different) < len(options):
        raise UserError(f"of the options {', '.join(map(repr, options))} two are equal; give each once")


def check_sampling(sampling: SamplingConfig, number: int = 0) -> None:
    """Raise UserError for keys of sampling that are set, for prompt `number` of several: in medical mode answers are
    made as when it was calibrated."""
    default = SamplingConfig().of_prompt(number)
    for key, value in sampling.model_dump().items():
        if value != getattr(default, key):
            raise UserError(
                f"{key}={value!r} does not go with medical mode, whose answers are made as they were calibrated: "
                f"greedily, at most {FREE_TEXT.max_new_tokens} tokens, one line; leave it out"
            )
