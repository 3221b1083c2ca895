"""How a backbone answers: of options the likeliest; freely, the greedy continuation to the end of its line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.inference.sampling import SamplingConfig, check_prompts
from lfm.inference.text import Continuation, continuations
from lfm.medical.features import (
    Features,
    batches_of_one_length,
    question_features,
    read,
    read_answers,
    score_options,
)
from lfm.medical.grading import is_right
from lfm.medical.questions import Question, Task
from lfm.models.language_model import LanguageModel

FREE_TEXT = SamplingConfig(greedy=True, max_new_tokens=48, stop=("\n",))
"""How a free answer is made, wherever a calibrated head judges it."""

P_TRUE = "{text}{answer}\nIs this answer right?"
"""Kadavath et al. 2022 (arXiv 2207.05221): the model judges its own answer, by the likelihood of these words."""
YES, NO = " yes", " no"


@dataclass
class Answered:
    """Of n questions."""

    answers: list[str]
    """As text, without the blank before."""
    right: np.ndarray
    """By likelihood of the right option, or the grader; bool `[n]`."""
    log_probability: np.ndarray
    """Of the answer's tokens, summed; float64 `[n]`."""
    mean_log_probability: np.ndarray
    options: list[np.ndarray]
    """Summed log-probability of each option; empty for free answers."""
    question: Features
    """At the end of the question."""
    answer: Features
    """At the end of the answer."""
    num_tokens: int
    """Of questions and answers given, for the cost."""
    made: list[Continuation]
    """Of free answers, as they were decoded; empty for options."""

    def __len__(self) -> int:
        return len(self.answers)


Progress = Callable[[int], None]


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    task: Task,
    *,
    batch_size: int = 32,
    progress: Progress = lambda count: None,
) -> Answered:
    """Answer questions.  Raises UserError for a prompt that is empty or has no room in the context."""
    prompts = prompt_ids(model, tokenizer, [question.text for question in questions])
    if not prompts:
        raise UserError("there is no question to answer; give a set with some")
    n = len(questions)
    found: list[str] = [""] * n
    options: list[np.ndarray] = [np.zeros(0)] * n
    decoded: list[Continuation] = [Continuation()] * n
    encoded, parts = _Encoded(tokenizer), list[tuple[list[int], Features]]()
    for batch in batches_of_one_length(prompts, batch_size):
        end, _ = read(model, [prompts[i] for i in batch])
        parts.append((batch, question_features(end)))
        if task == "choice":
            pairs = [(place, option) for place, i in enumerate(batch) for option in questions[i].options]
            ids = [encoded(option) for _, option in pairs]
            longest, (place, _) = max(zip(map(len, ids), pairs, strict=True), key=lambda item: item[0])
            limit, most = model.config.context_limit, len(prompts[batch[0]]) + longest
            if limit is not None and most > limit:
                raise UserError(
                    f"question {batch[place] + 1} has {most} tokens with its longest option and the context is "
                    f"{limit}; shorten it"
                )
            sums = score_options(model, end, [place for place, _ in pairs], ids, batch_size=8 * batch_size).numpy()
            at = 0
            for i in batch:
                options[i] = sums[at : at + len(questions[i].options)]
                at += len(questions[i].options)
                found[i] = questions[i].options[int(options[i].argmax())]
        else:
            *_, made = continuations(model, tokenizer, [prompts[i] for i in batch], FREE_TEXT)
            for i, each in zip(batch, made, strict=True):
                found[i], decoded[i] = each.text, each
        progress(len(batch))
    limit = model.config.context_limit
    ids = [encoded.of_answer(text) for text in found]
    if limit is not None:  # ids of a text that was decoded may be more than those it was decoded from
        ids = [of[: max(1, limit - len(prompt))] for of, prompt in zip(ids, prompts, strict=True)]
    scores, features = read_answers(model, prompts, ids, batch_size=batch_size)
    found = [text.strip() for text in found]
    order = torch.tensor([i for batch, _ in parts for i in batch]).argsort()
    right = np.array([is_right_answer(q, text, task) for q, text in zip(questions, found, strict=True)])
    return Answered(
        answers=found,
        right=right,
        log_probability=scores.log_probability.numpy(),
        mean_log_probability=scores.mean.numpy(),
        options=options,
        question=Features.together([part for _, part in parts]).rows(order),
        answer=features,
        num_tokens=sum(map(len, prompts)) + sum(map(len, ids)),
        made=decoded if task == "text" else [],
    )


def is_right_answer(question: Question, text: str, task: Task) -> bool:
    """Of options, the right one itself; a free answer by the grader."""
    wanted = question.completion.strip()
    return text == wanted if task == "choice" else is_right(text, wanted)


def prompt_ids(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Raises UserError, naming the place, for a text that is empty or has no room in the context."""
    found = []
    for number, text in enumerate(texts, start=1):
        try:
            if not text.strip():
                raise UserError("a prompt is empty; ask something")
            found.append(tokenizer.encode_prompt(text))
            check_prompts(found[-1:], model.config.context_limit)
        except UserError as error:
            raise UserError(f"question {number}: {error}") from None
    return found


def p_true(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Log-odds of yes over no when the model is asked whether its answer is right; float64 `[n]`."""
    asked = [P_TRUE.format(text=q.text, answer=" " + text) for q, text in zip(questions, answers, strict=True)]
    prompts, encoded = prompt_ids(model, tokenizer, asked), _Encoded(tokenizer)
    found = np.zeros(len(prompts))
    for batch in batches_of_one_length(prompts, batch_size):
        end, _ = read(model, [prompts[i] for i in batch])
        both = [encoded(word) for word in (YES, NO)] * len(batch)
        places = [place for place in range(len(batch)) for _ in (YES, NO)]
        sums = score_options(model, end, places, both, batch_size=8 * batch_size).numpy().reshape(-1, 2)
        found[batch] = sums[:, 0] - sums[:, 1]
    return found


def agreement(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    answered: Answered,
    task: Task,
    *,
    samples: int = 10,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Of answers sampled at temperature 1: the share that agree with the one given, and their semantic entropy in nats.

    Farquhar et al. 2024 (doi 10.1038/s41586-024-07421-0): meanings are told apart by the grader.  Of options the
    entropy is exact, over their normalized probabilities, and the samples are drawn from these.
    """
    draws = np.random.Generator(np.random.PCG64(0))
    share, entropy = np.zeros(len(answered)), np.zeros(len(answered))
    if task == "choice":
        for i, logs in enumerate(answered.options):
            p = np.exp(logs - logs.max())
            p /= p.sum()
            share[i] = draws.multinomial(samples, p)[int(logs.argmax())] / samples
            entropy[i] = -(p * np.log(np.maximum(p, 1e-300))).sum()
        return share, entropy
    prompts = prompt_ids(model, tokenizer, [question.text for question in questions])
    each = FREE_TEXT.model_copy(update={"greedy": False, "top_k": 0, "top_p": 1.0})
    for batch in batches_of_one_length(prompts, max(1, batch_size // samples)):
        rows = [prompts[i] for i in batch for _ in range(samples)]
        settings = [each.of_prompt(i * samples + k) for i in batch for k in range(samples)]
        *_, made = continuations(model, tokenizer, rows, settings)
        for place, i in enumerate(batch):
            texts = [made[place * samples + k].text for k in range(samples)]
            meanings: list[list[str]] = []
            for text in texts:
                same = next((m for m in meanings if is_right(text, m[0])), None)
                if same is None:
                    meanings.append([text])
                else:
                    same.append(text)
            p = np.array([len(m) for m in meanings]) / samples
            share[i] = sum(is_right(text, answered.answers[i]) for text in texts) / samples
            entropy[i] = -(p * np.log(p)).sum()
    return share, entropy


class _Encoded:
    """Ids of texts that follow others; of each, once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._found = tokenizer, dict[str, list[int]]()

    def __call__(self, text: str) -> list[int]:
        if text not in self._found:
            ids = self._tokenizer.encode(text)
            if not ids:
                raise UserError(f"the answer {text!r} has no ids in this tokenizer; give another")
            self._found[text] = ids
        return self._found[text]

    def of_answer(self, text: str) -> list[int]:
        """Of what a model made; a line's end where that is nothing.  Its text is in no error: it is not judged yet."""
        ids = self._tokenizer.encode(text) if text.strip() else []
        return ids or self("\n")
