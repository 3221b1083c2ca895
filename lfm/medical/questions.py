"""Questions with known answers, of sets in their published formats, and the parts that a calibration needs apart.

| part | what it is for |
| --- | --- |
| training | the backbone may have seen it |
| fit | the uncertainty head learns from the backbone's right and wrong answers |
| calibration | scaling and threshold |
| test | the report |

A group, whose questions are nearly equal, is in one part as a whole.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lfm.errors import UserError
from lfm.files import exists, read_file, shown

Part = Literal["training", "fit", "calibration", "test"]
Task = Literal["choice", "text"]
"""How an answer is found: of the options by likelihood, or free text by greedy decoding."""
PARTS: tuple[Part, ...] = ("training", "fit", "calibration", "test")

_RESIDUAL = re.compile(r"\b(?:unspecified|other|not elsewhere classified|nos)\b", re.IGNORECASE)
_ASKED_FOR = {"icd10": "Chapter", "gcide": "Field"}
"""Of the sets that data_pipeline.labelled makes: what a text is followed by."""


@dataclass(frozen=True)
class Question:
    """What is asked, and which answers are right."""

    text: str
    """The prompt; an answer follows it."""
    options: tuple[str, ...]
    """Each as it follows the prompt, its blank included; of a free answer those that are right."""
    answer: int
    """The right one's place in `options`."""
    group: str
    source: str
    """Name of the set."""
    specialty: str
    kind: str
    """Type of question."""

    @property
    def completion(self) -> str:
        """The right answer, as it follows the prompt."""
        return self.options[self.answer]


@dataclass(frozen=True)
class QuestionSet:
    parts: dict[Part, list[Question]]
    straddling: int = 0
    """Questions that were left out because an earlier part has their group."""

    def words(self) -> list[str]:
        """What was left out because parts have it in common, and which questions may be copies."""
        said = []
        if self.straddling:
            said.append(f"left out: {self.straddling:,} questions whose group an earlier part has")
        first: dict[tuple[str, frozenset[str]], tuple[str, str]] = {}
        again: Counter[str] = Counter()
        for part in PARTS:
            for question in self.parts[part]:
                key, group = (normalized(question.text), frozenset(question.options)), (question.source, question.group)
                again[part] += first.setdefault(key, group) != group
        if any(again.values()):
            counts = ", ".join(f"{count:,} of the {part} part" for part, count in again.items() if count)
            said.append(
                f"note: questions with the words of an earlier one of another group: {counts}; if they are copies "
                "and no cases of their own, give them one group: else the guarantee is void, and all looks too safe"
            )
        return said

    def limited(self, part: Part, count: int) -> "QuestionSet":
        """With the first so many questions of a part, by a hash of their groups; 0: all.  Raises UserError for none."""
        questions = self.parts[part]
        if not questions:
            raise UserError(f"the data has no question for the {part} part; give more of it with --data DIR")
        if not count:
            return self
        order = sorted(range(len(questions)), key=lambda i: (share_of(f"limit {questions[i].group}"), i))[:count]
        return QuestionSet({**self.parts, part: [questions[i] for i in sorted(order)]}, self.straddling)

    def digest(self, part: Part) -> str:
        """sha256 of the questions of a part, in order."""
        lines = (json.dumps(asdict(question), sort_keys=True) for question in self.parts[part])
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_questions(folders: Sequence[Path]) -> QuestionSet:
    """The questions of one or more folders, each of one of the formats below.

    Raises UserError, naming file and line, for what is none of them, and for a set of which no question is left.
    """
    parts: dict[Part, list[Question]] = {part: [] for part in PARTS}
    known: list[dict[Part, list[Question]]] = []
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise UserError(f"{shown(folder)} is given twice, and each question would count twice; name it once")
        found = _read_folder(folder)
        if not any(found.values()):
            raise UserError(f"{shown(folder)} holds no question; give a folder with some")
        if found in known:
            other = folders[known.index(found)]
            raise UserError(
                f"{shown(folder)} has the questions of {shown(other)}, and each would count twice; name one"
            )
        known.append(found)
        for part, questions in found.items():
            parts[part] += questions
    return _without_straddling(parts)


def share_of(group: str) -> float:
    """Between 0 and 1, from the group's name alone."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") / 2**64


def normalized(text: str) -> str:
    """Lower-case words, by which near-equal questions are one group."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _without_straddling(parts: Mapping[Part, list[Question]]) -> QuestionSet:
    """An earlier part keeps a group."""
    owner: dict[tuple[str, str], Part] = {}
    kept: dict[Part, list[Question]] = {part: [] for part in PARTS}
    left_out = 0
    for part in PARTS:
        for question in parts[part]:
            if owner.setdefault((question.source, question.group), part) == part:
                kept[part].append(question)
            else:
                left_out += 1
    return QuestionSet(kept, left_out)


def _read_folder(folder: Path) -> dict[Part, list[Question]]:
    for is_one, read in _FORMATS:
        if is_one(folder):
            return read(folder)
    raise UserError(
        f"{shown(folder)} is no set of questions: it has neither labels.json (data_pipeline.labelled), nor train.json "
        "and dev.json (MedMCQA), nor *train.jsonl and *test.jsonl (MedQA), nor ori_pqal.json (PubMedQA)"
    )


def _placed(questions: Sequence[Question], bounds: Sequence[tuple[Part, float]]) -> dict[Part, list[Question]]:
    """Each in the first part whose bound is above its group's share."""
    found: dict[Part, list[Question]] = {part: [] for part in PARTS}
    for question in questions:
        share = share_of(question.group)
        part: Part = next(part for part, bound in bounds if share < bound)
        found[part].append(question)
    return found


_TRAINING: tuple[tuple[Part, float], ...] = (("training", 0.7), ("fit", 0.85), ("calibration", 1.0))
_HELD_OUT: tuple[tuple[Part, float], ...] = (("fit", 0.5), ("calibration", 1.0))
_TEST: tuple[tuple[Part, float], ...] = (("test", 1.0),)
_WHOLE: tuple[tuple[Part, float], ...] = (("training", 0.4), ("fit", 0.55), ("calibration", 0.75), ("test", 1.0))


def _of_files(files: Mapping[Path, tuple], read: Callable[[Path], list[Question]]) -> dict[Part, list[Question]]:
    found: dict[Part, list[Question]] = {part: [] for part in PARTS}
    for path, bounds in files.items():
        for part, questions in _placed(read(path), bounds).items():
            found[part] += questions
    return found


def _labelled(folder: Path) -> dict[Part, list[Question]]:
    """Of data_pipeline.labelled: which of its labels a text has.

    Its specialty is the label: conditioning on it is conditioning on the answer.
    """
    try:
        labels = json.loads(read_file(folder / "labels.json"))
        if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise ValueError
        kind = json.loads(read_file(folder / "report.json"))["config"]["source"]["kind"]
        if not isinstance(kind, str) or not _are_options(labels) or has_half_a_character("".join([kind, *labels])):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"{shown(folder)} has no labels.json with labels, two or more, and report.json with their source; prepare "
            "it again"
        ) from None
    options = tuple(f" {label}" for label in labels)
    asked_for = _ASKED_FOR.get(kind, "Label")

    def read(path: Path) -> list[Question]:
        questions = []
        for place, row in _lines(path):
            text, label, group = (_text(row, key, place) for key in ("text", "label", "group"))
            if label not in labels:
                raise UserError(f"{place} has the label {label!r}, which labels.json does not have; prepare it again")
            is_residual = _RESIDUAL.search(text) is not None
            questions.append(
                Question(
                    text=f"{text}\n{asked_for}:",
                    options=options,
                    answer=labels.index(label),
                    group=group,
                    source=str(kind),
                    specialty=label,
                    kind=f"{kind}, {'residual' if is_residual else 'specific'}",
                )
            )
        return questions

    files = {"train": (("training", 1.0),), "validation": _HELD_OUT, "test": _TEST}
    found = _of_files({folder / f"{name}.jsonl": bounds for name, bounds in files.items()}, read)
    occurring = {question.completion[1:] for questions in found.values() for question in questions}
    for label in labels:
        if label not in occurring:
            raise UserError(f"{shown(folder)}: no text has the label {label!r} of labels.json; prepare it again")
    return found


def _medmcqa(folder: Path) -> dict[Part, list[Question]]:
    """MedMCQA (Pal et al. 2022, arXiv 2203.14371): JSON lines; `cop` is the right option from 1.  Its test split has no
    answers; dev is the test here."""

    def read(path: Path) -> list[Question]:
        questions = []
        for place, row in _lines(path):
            asked, right = _text(row, "question", place), row.get("cop")
            if type(right) is not int or not 1 <= right <= 4:
                raise UserError(f"{place} has cop={right!r}; the right option is 1, 2, 3 or 4")
            options = [_text(row, f"op{letter}", place) for letter in "abcd"]
            subject = _whole(str(row.get("subject_name") or "unknown"), "subject_name", place)
            kind = _whole(str(row.get("choice_type") or "single"), "choice_type", place)
            questions.append(_asked(place, "medmcqa", asked, options, right - 1, subject, kind))
        return questions

    return _of_files({folder / "train.json": _TRAINING, folder / "dev.json": _TEST}, read)


def _medqa(folder: Path) -> dict[Part, list[Question]]:
    """MedQA (Jin et al. 2020, arXiv 2009.13081), US questions: JSON lines with `options` by letter."""

    def read(path: Path) -> list[Question]:
        questions = []
        for place, row in _lines(path):
            options, right = row.get("options"), row.get("answer_idx")
            if not isinstance(options, dict) or not all(isinstance(option, str) for option in options.values()):
                raise UserError(f"{place} has no texts under options, by letter")
            for letter, option in options.items():
                _whole(letter + option, "options", place)
            if not isinstance(right, str) or right not in options:
                raise UserError(f"{place} has answer_idx={right!r}, which is none of its options {', '.join(options)}")
            answer = row.get("answer")
            if isinstance(answer, str) and answer.strip() != options[right].strip():
                raise UserError(
                    f"{place} has answer={answer!r}, and option {right} of its answer_idx is {options[right]!r}; "
                    "leave the question out"
                )
            asked = _text(row, "question", place)
            step = _whole(str(row.get("meta_info") or "unknown"), "meta_info", place)
            questions.append(
                _asked(place, "medqa", asked, list(options.values()), list(options).index(right), step, "case")
            )
        return questions

    files = {"train": _TRAINING, "dev": _HELD_OUT, "test": _TEST}
    paths = {name: sorted(folder.glob(f"*{name}.jsonl")) for name in files}
    for name, found in paths.items():
        if len(found) > 1:
            raise UserError(
                f"{shown(folder)} has {len(found)} files *{name}.jsonl ({', '.join(path.name for path in found)}); "
                "leave one"
            )
    return _of_files({paths[name][0]: bounds for name, bounds in files.items() if paths[name]}, read)


def _pubmedqa(folder: Path) -> dict[Part, list[Question]]:
    """PubMedQA's labelled set (Jin et al. 2019, arXiv 1909.06146): one JSON object by PubMed number; yes, no or maybe
    after an abstract without its conclusion."""
    path, answers = folder / "ori_pqal.json", ("yes", "no", "maybe")
    try:
        entries = json.loads(read_file(path))
        items = list(entries.items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{shown(path)} is no JSON object of abstracts by number; fetch it again") from None
    questions = []
    for number, row in items:
        place = f"entry {number if number.isprintable() else repr(number)} of {shown(path)}"
        _whole(number, "its number", place)
        if not isinstance(row, dict) or not isinstance(row.get("CONTEXTS"), list):
            raise UserError(f"{place} has no list under CONTEXTS")
        asked, right = _text(row, "QUESTION", place), row.get("final_decision")
        if right not in answers:
            raise UserError(f"{place} has final_decision={right!r}; it is yes, no or maybe")
        if not all(isinstance(part, str) for part in row["CONTEXTS"]):
            raise UserError(f"{place} has something else than texts under CONTEXTS")
        context = _whole(" ".join(row["CONTEXTS"]), "CONTEXTS", place)
        made = _asked(
            place, "pubmedqa", f"{context}\n{asked}", answers, answers.index(right), "research", "yes/no/maybe"
        )
        questions.append(Question(**{**asdict(made), "options": made.options, "group": str(number)}))
    return _placed(questions, _WHOLE)


_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], dict[Part, list[Question]]]], ...] = (
    (lambda folder: exists(folder / "labels.json"), _labelled),
    (lambda folder: exists(folder / "train.json") and exists(folder / "dev.json"), _medmcqa),
    (lambda folder: any(folder.glob("*train.jsonl")) and any(folder.glob("*test.jsonl")), _medqa),
    (lambda folder: exists(folder / "ori_pqal.json"), _pubmedqa),
)


def _are_options(texts: Sequence[str]) -> bool:
    """Whether one can be chosen from another."""
    stripped = [text.strip() for text in texts]
    return len(stripped) > 1 and all(stripped) and len({*stripped}) == len(stripped)


def _asked(
    place: str, source: str, asked: str, options: Sequence[str], answer: int, specialty: str, kind: str
) -> Question:
    """A question of an examination; its group is its own words, so that copies of it stay together."""
    if not _are_options(options):
        raise UserError(f"{place} has options that are empty, equal or one alone; leave the question out")
    return Question(
        text=f"{asked}\nAnswer:",
        options=tuple(f" {option.strip()}" for option in options),
        answer=answer,
        group=normalized(asked),
        source=source,
        specialty=specialty,
        kind=kind,
    )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, and what to call each in an error."""
    for number, line in enumerate(read_file(path).rstrip().splitlines(), start=1):
        place = f"line {number} of {shown(path)}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(f"{place} is no JSON object; fetch or prepare the set again") from None
        yield place, row


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} has no text under {key}; fetch or prepare the set again")
    return _whole(value, key, place).strip()


def _whole(value: str, key: str, place: str) -> str:
    if has_half_a_character(value):
        raise UserError(f"{place} has half a character under {key}, which is no text; fetch or prepare the set again")
    return value


def has_half_a_character(text: str) -> bool:
    """Which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
