"""Tasks of lm-evaluation-harness on our models: the only file that knows lm_eval."""

import contextlib
import difflib
import io
import logging
import random
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks.manager import TaskDict, TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lfm.config import shipped_configs
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.evaluation.scoring import score_continuations
from lfm.evaluation.task_result import TaskResult
from lfm.files import shown
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import continuations
from lfm.models.language_model import LanguageModel

_MAX_NEW_TOKENS = 256
"""Where a task does not say, as the harness has it for other models."""


class HarnessModel(TemplateLM):
    """A model as the harness asks for it.

    An empty context is the beginning-of-text id, and where the tokenizer has none the end of a document, as for the
    harness's own models.  What is longer than the model's context loses its beginning; without a limit nothing is lost.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: int) -> None:
        super().__init__()
        self.model, self.own_tokenizer, self.batch_size = model, tokenizer, batch_size
        self.limit: int | None = model.config.context_limit

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.own_tokenizer.bos_id is None else self.own_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.own_tokenizer.encode(string)
        begins = self.own_tokenizer.bos_id is not None and add_special_tokens is not False
        return [self.prefix_token_id, *ids] if begins else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self.model, pairs, batch_size=self.batch_size)
        return [(-float(of.nats.sum()), bool(of.is_greedy.all())) for of in scores]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        if not continuation:
            raise UserError("a task has a continuation without a token behind its context; correct the task")
        if self.limit is None:
            return context, continuation
        if len(continuation) > self.limit:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context of {self.limit}; "
                "take another task"
            )
        return context[-(self.limit + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in self._windows(ids):
                pairs.append(pair)
                owners.append(number)
        totals = [0.0] * len(requests)
        found = score_continuations(self.model, pairs, batch_size=self.batch_size)
        for owner, scores in zip(owners, found, strict=True):
            totals[owner] -= float(scores.nats.sum())
        return totals

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        if self.limit is None:
            return [([self.prefix_token_id], ids)] if ids else []
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.limit, context_len=1)
        return [make_disjoint_window(window) for window in rolling]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts, samplings = [], []
        for number, request in enumerate(requests):
            arguments: Any = request.args
            context, kwargs = arguments
            sampling = _sampling(kwargs, seed=number)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if self.limit is not None:
                if sampling.max_new_tokens >= self.limit:
                    raise UserError(
                        f"a task generates {sampling.max_new_tokens} tokens and the model's context is {self.limit}; "
                        "take another task"
                    )
                ids = ids[-(self.limit - sampling.max_new_tokens) :]
            prompts.append(ids)
            samplings.append(sampling)
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (-samplings[i].max_new_tokens, -len(prompts[i])))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            *_, made = continuations(
                self.model, self.own_tokenizer, [prompts[i] for i in chosen], [samplings[i] for i in chosen]
            )
            for i, continuation in zip(chosen, made, strict=True):
                texts[i] = continuation.text
        return texts


def _sampling(kwargs: dict[str, Any], *, seed: int) -> SamplingConfig:
    """What a task's generation_kwargs mean.  Raises UserError for a key that is none of ours."""
    given = dict(kwargs)
    until = given.pop("until", None) or []
    most = [given.pop(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in given]
    samples = bool(given.pop("do_sample", False)) and given.get("temperature", 1.0) > 0
    tree = {key: given.pop(key) for key in ("temperature", "top_k", "top_p", "min_p") if key in given}
    tree = {"top_k": 50, "top_p": 1.0} | tree if samples else {"greedy": True}
    if given:
        raise UserError(f"a task's generation_kwargs hold {', '.join(given)}, unknown here; take another task")
    stop = [until] if isinstance(until, str) else until
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise UserError(
            f"a task's generation_kwargs have until = {until!r}, no text or list of texts; correct the task"
        )
    tree |= {"max_new_tokens": most[0] if most else _MAX_NEW_TOKENS, "stop": [text for text in stop if text]}
    return SamplingConfig.from_tree({**tree, "seed": seed}, source="a task's generation_kwargs")


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, to be evaluated any number of times."""

    loaded: TaskDict
    own_fewshot: dict[str, int | None]
    """Worked examples that each task asks for itself; None: it leaves that open."""

    def evaluate(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> dict[str, TaskResult]:
        """By task and, for groups, by group too.  No generator of random numbers of the process is touched.

        It is `simple_evaluate` without its report on the machine, which takes seconds and starts programs.
        """
        adapter = HarnessModel(model, tokenizer, batch_size=batch_size)
        with _aside():
            for name, task in self.loaded["tasks"].items():
                own = self.own_fewshot[name]
                # A task that asks for none is one whose question is broken by examples.
                shots = own if own == 0 or num_fewshot is None else num_fewshot
                task.set_config(key="num_fewshot", value=shots or 0)
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            with _explained(list(self.loaded["tasks"])):
                # No bootstrap of the harness's: it starts processes.
                found: Any = evaluate(lm=adapter, task_dict=self.loaded, limit=limit, bootstrap_iters=0)
        return {name: _result(name, values, found) for name, values in found["results"].items()}


@contextlib.contextmanager
def _explained(names: Sequence[str]) -> Iterator[None]:
    """What YAML, code or a document of a task brings the harness to becomes a UserError; errors of ours stay."""
    which = f"task {names[0]}" if len(names) == 1 else "one of the tasks " + textwrap.shorten(", ".join(names), 200)
    try:
        yield
    except UserError as error:
        raise UserError(f"{which}: {error}") from None
    except Exception as error:
        own = [frame.filename == __file__ for frame in traceback.extract_tb(error.__traceback__)]
        if any(own[own.index(False) :]) or isinstance(error, (torch.OutOfMemoryError, OSError)):
            raise
        raise UserError(f"{which} cannot be scored ({_why(error)}); correct its YAML or its documents") from None


def _why(error: BaseException) -> str:
    """In a line, with what caused it: errors of the data set library often say nothing themselves."""
    if isinstance(error, StopIteration):
        return "it has no documents"
    cause = "" if error.__cause__ is None else f", from {_why(error.__cause__)}"
    return textwrap.shorten(f"{type(error).__name__}: {error}{cause}", 300, placeholder=" ...")


def _result(name: str, values: dict[str, Any], found: dict[str, Any]) -> TaskResult:
    numbers = {key: float(value) for key, value in values.items() if _is_metric(key, value)}
    samples: dict[str, list[Any]] = {key: [] for key in numbers}
    for sample in found.get("samples", {}).get(name, []):
        for key in numbers:
            metric, _, of_filter = key.partition(",")
            if sample["filter"] == of_filter and metric in sample:
                samples[key].append((sample["doc_id"], sample[metric]))
    by_document = {}
    for key, rows in samples.items():
        if rows and all(isinstance(value, (int, float, np.number)) for _, value in rows):
            each = np.array([value for _, value in sorted(rows, key=lambda row: row[0])], np.float64)
            if np.isclose(each.mean(), numbers[key]):  # else it is no mean over documents
                by_document[_short(key)] = each
    count = max(map(len, by_document.values()), default=values.get("sample_len", 0))
    return TaskResult(name, {_short(key): value for key, value in numbers.items()}, count, by_document)


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, (int, float, np.number))


def _short(key: str) -> str:
    return key.removesuffix(",none")


def open_tasks(wanted: Sequence[str], folders: Sequence[Path] = ()) -> Tasks:
    """Tasks, groups and tags by name, by a YAML file, or all of a folder, with their data.

    Names are looked for in `folders`, then among those that come with this project, then the harness's.  Raises
    UserError for a name or file that is none, and data that cannot be had.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{shown(folder)} is no folder of tasks; correct --include-path")
    paths = [shipped_configs() / "tasks", *folders, *(Path(name) for name in wanted if Path(name).is_dir())]
    with _aside():
        specs = list(dict.fromkeys(spec for name in wanted for spec in _specs(name)))
        manager = TaskManager(include_path=[*paths], include_defaults=False)
        if any(spec not in manager.task_index and not _is_file(spec) for spec in specs):
            manager = TaskManager(include_path=[*paths])  # takes a while: it has fifteen thousand
        tasks, groups, children = {}, {}, {}
        for spec in specs:
            found = _loaded(manager, spec)
            tasks |= found["tasks"]
            groups |= found.get("groups", {})
            children |= found.get("group_map", {})
    own_fewshot = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    return Tasks({"tasks": tasks, "groups": groups, "group_map": children}, own_fewshot)


def _is_file(spec: str) -> bool:
    """Whether it is a file of a task.  Raises UserError for the name of one that does not exist."""
    is_file = Path(spec).is_file()
    if not is_file and spec.endswith((".yaml", ".yml")):
        raise UserError(f"{shown(spec)} is no file; name a task, or a YAML file or folder of them")
    return is_file


def _specs(name: str) -> list[str]:
    """Of a folder, the tasks in it; else what was given."""
    if not Path(name).is_dir():
        return [name]
    found = TaskManager(include_path=name, include_defaults=False).all_subtasks
    if not found:
        raise UserError(f"{shown(name)} holds no YAML file of a task; name a task, or a file or folder of them")
    return found


def _loaded(manager: TaskManager, spec: str) -> TaskDict:
    if spec not in manager.task_index and not Path(spec).is_file():
        near = difflib.get_close_matches(spec, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "name one that it knows, or a YAML file or folder"
        raise UserError(f"{shown(spec)} is no task of this project or lm-evaluation-harness; {hint}")
    try:
        found = manager.load([spec])
    except Exception as error:  # whatever a task's own code, its YAML or the data set library raise
        if (shipped_configs() / "tasks" / f"{spec}.yaml").exists():
            way_out = "its data are made by `python -m data_pipeline.make_tasks`"
        elif Path(spec).is_file():
            way_out = "correct the YAML or its data"
        else:
            way_out = "data of the harness's own tasks come from the Hugging Face hub"
        raise UserError(f"task {shown(spec)} cannot be loaded ({_why(error)}); {way_out}") from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {shown(name)} runs code or shows pictures, which is not done here; leave it out")
    return found


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """The harness draws bars, logs what is no news here, and draws random numbers that training must not miss."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
