"""What a model answers to questions and how sure it and its heads are: a JSON object a question."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import read_file, shown
from lfm.medical.answering import Answered, agreement, answer, p_true
from lfm.medical.evidence import METHODS, Evidence, Method
from lfm.medical.fitting import input_of
from lfm.medical.head import UncertaintyHead
from lfm.medical.questions import Question, Task
from lfm.models.language_model import LanguageModel


def predict(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    task: Task,
    heads: Mapping[str, UncertaintyHead],
    part: str,
    *,
    batch_size: int = 32,
    baselines: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer, and ask the heads; with `baselines` also P(True) and samples, which take further passes."""
    answered = answer(model, tokenizer, questions, task, batch_size=batch_size, progress=progress)
    rows = rows_of(answered, questions, heads, part)
    if baselines:
        asked = p_true(model, tokenizer, questions, answered.answers, batch_size=batch_size)
        share, entropy = agreement(model, tokenizer, questions, answered, task, batch_size=batch_size)
        for row, p, s, e in zip(rows, asked, share, entropy, strict=True):
            row |= {"p_true": round(float(p), 5), "agreement": float(s), "semantic_entropy": round(float(e), 6)}
    return rows


def rows_of(
    answered: Answered, questions: Sequence[Question], heads: Mapping[str, UncertaintyHead], part: str
) -> list[dict[str, Any]]:
    logits = {name: head.logits(input_of(name, answered)) for name, head in heads.items()}  # pyright: ignore
    rows = []
    for i, question in enumerate(questions):
        rows.append(
            {
                "part": part,
                **{key: getattr(question, key) for key in ("source", "group", "specialty", "kind")},
                "answer": answered.answers[i],
                "reference": question.completion.strip(),
                "right": bool(answered.right[i]),
                "options": [round(float(x), 4) for x in answered.options[i]],
                "right_option": question.answer,
                "log_probability": round(float(answered.log_probability[i]), 5),
                "mean_log_probability": round(float(answered.mean_log_probability[i]), 5),
                "logits": {name: round(float(z[i]), 5) for name, z in logits.items()},
            }
        )
    return rows


def to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def from_lines(path: Path) -> list[dict[str, Any]]:
    """Raises UserError, naming the line, for one that is no prediction."""
    rows = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "right": bool(row["right"]), "part": str(row["part"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"line {number} of {shown(path)} is no prediction; make the file again") from None
    return rows


def faithfulness(found: Sequence[Evidence], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Means over questions, with 95 % intervals, and differences of the drive from the other ways to choose spans."""
    draws = np.random.Generator(np.random.PCG64(seed))
    methods: list[Method] = [method for method in METHODS if all(method in each.faithfulness for each in found)]
    if not found:
        return {"questions": 0}
    values = {method: np.array([each.faithfulness[method] for each in found]) for method in methods}
    places = draws.integers(0, len(found), (resamples, len(found)))

    def interval(x: np.ndarray) -> list[float]:
        low, high = np.quantile(x[places].mean(axis=1), [0.025, 0.975])
        return [float(x.mean()), float(low), float(high)]

    names = ("comprehensiveness", "sufficiency")
    result: dict[str, Any] = {"questions": len(found)}
    for k, name in enumerate(names):
        result[name] = {method: interval(values[method][:, k]) for method in methods}
        result[f"{name}_of_drive_less_that_of"] = {
            method: interval(values["drive"][:, k] - values[method][:, k]) for method in methods if method != "drive"
        }
    return result
