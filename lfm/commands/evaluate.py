"""Evaluate: `lfm eval --checkpoint runs/NAME [--checkpoint OTHER] [--text FILE ...] [--tasks NAME,...]`.

Without texts or tasks, the held-out rows of the run's own data set.
"""

import argparse
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lfm.commands.evaluate_medical import MedicalEvaluationConfig
from lfm.commands.evaluate_medical import evaluate as evaluate_medical
from lfm.config import Config, Count, add_flags, from_flags, path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, expanded, ready_folder, refusing, shown, write_durably
from lfm.talk import waiting

if TYPE_CHECKING:
    from lfm.commands.evaluation_report import Evaluated
    from lfm.evaluation.harness import Tasks
    from lfm.evaluation.text import Document
    from lfm.models.language_model import LanguageModel

Device = Literal["auto", "cpu", "cuda"]


class EvaluateConfig(Config):
    split: Literal["train", "validation"] = "validation"
    """Which rows of a data set: those that were trained on, or held out."""
    max_rows: int = Field(default=0, ge=0, lt=1 << 31)
    """Only so many rows, at equal distances; 0: all."""
    batch_size: int = Field(default=8, gt=0, le=1 << 16)
    """Rows, texts or requests of tasks scored at once; no result depends on it but for rounding."""
    context: int = Field(default=0, ge=0, le=1 << 24)
    """Of --text: tokens of a window; 0: the model's context, and where that has no limit whole texts, the state
    carried."""
    stride: int = Field(default=0, ge=0, le=1 << 24)
    """Of --text: tokens between the beginnings of two windows; 0: half a window."""
    limit: Count | None = None
    """Of --tasks: only the first so many documents of each."""
    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Of --tasks: worked examples before each question, instead of the task's own number."""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score texts, tasks or a split of a data set with trained models.  Several checkpoints are "
        "compared with the first: differences with paired bootstrap intervals.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder, or hf://USER/NAME; may be given several times",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        type=path_flag,
        metavar="FILE",
        help="perplexity and bits per byte of each",
    )
    parser.add_argument(
        "--tasks",
        action="append",
        metavar="NAME,...",
        help="of lm-evaluation-harness: names of its own or this project's, YAML files, folders of them",
    )
    parser.add_argument(
        "--include-path", action="append", type=path_flag, metavar="DIR", help="folder of more tasks to be named"
    )
    parser.add_argument(
        "--data",
        action="append",
        type=path_flag,
        metavar="DIR",
        help="data set folder; default: the run's own data.path; with --medical sets of questions, one or more",
    )
    parser.add_argument(
        "--medical", action="store_true", help="does the model know when it is wrong? see docs/medical.md"
    )
    parser.add_argument("--task", choices=("choice", "text"), default="choice", help="of --medical: kind of answer")
    parser.add_argument(
        "--shifted", action="append", type=path_flag, metavar="DIR", help="of --medical: a set of another kind"
    )
    parser.add_argument(
        "--safety-threshold", type=float, metavar="P", help="of --medical; default: that of the run's configuration"
    )
    parser.add_argument("--out", type=path_flag, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--int8", action="store_true", help="products of 8-bit integers, on a CPU (docs/export.md)")
    add_flags(parser, EvaluateConfig)
    add_flags(parser, MedicalEvaluationConfig)
    flags = parser.parse_args()
    config, of_medical = from_flags(EvaluateConfig, flags), from_flags(MedicalEvaluationConfig, flags)
    _check_flags(flags, config, of_medical)
    if flags.medical:
        evaluate_medical(flags, of_medical, batch_size=config.batch_size, max_rows=config.max_rows)
        return
    names = _names(flags.checkpoint)
    documents, tasks = _opened(flags)
    found = []
    for name, checkpoint in zip(names, flags.checkpoint, strict=True):
        found.append(_evaluate(name, checkpoint, documents, tasks, flags, config))
    from lfm.commands.evaluation_report import report, tables

    for line in tables(found, documents):
        print(line)
    if flags.out is not None:
        settings = {**config.model_dump(), "tasks": flags.tasks or [], "device": flags.device}
        content = json.dumps(report(found, documents, settings), indent=1, allow_nan=False) + "\n"
        with refusing("give another file with --out FILE"):
            write_durably(flags.out, content.encode())


def _check_flags(flags: argparse.Namespace, config: EvaluateConfig, of_medical: MedicalEvaluationConfig) -> None:
    of_mode = flags.shifted or flags.task != "choice" or flags.safety_threshold is not None
    if not flags.medical and (of_mode or of_medical != MedicalEvaluationConfig()):
        raise UserError(
            "--shifted, --task, --safety-threshold, --splits, --resamples and --evidence-questions are of --medical, "
            "which is not given; give it, or leave them out"
        )
    if not flags.medical and len(flags.data or ()) > 1:
        raise UserError("--data is given twice; several sets are for --medical, else name one")
    for key, needs in {"context": "text", "stride": "text", "limit": "tasks", "num_fewshot": "tasks"}.items():
        if getattr(config, key) != EvaluateConfig.model_fields[key].default and not getattr(flags, needs):
            raise UserError(
                f"--{key.replace('_', '-')} is of --{needs}, which is not given; give it, or leave this out"
            )
    if flags.data is not None and (flags.text or flags.tasks):
        raise UserError("--data is a data set whose split is scored; it does not go with --text or --tasks")
    if flags.include_path and not flags.tasks:
        raise UserError("--include-path is a folder of tasks; name those to be scored with --tasks")
    if flags.out is not None:
        _check_out(flags.out, flags.text or ())


def _check_out(out: Path, texts: Sequence[Path]) -> None:
    """Raise UserError where nothing can be written, or what must not be lost would be: before hours of scoring."""
    if out.is_dir():
        raise UserError(f"--out {shown(out)} is a folder; name a file in it")
    if out.exists():
        if not out.is_file():
            raise UserError(f"--out {shown(out)} is no regular file; name one, whose content is replaced")
        if any(out.samefile(text) for text in texts):
            raise UserError(f"--out {shown(out)} is one of --text, which would be lost; name another file")
        if _is_standard_output(out):
            raise UserError(f"--out {shown(out)} is where the tables go; name another file")
    ready_folder(out.parent)


def _is_standard_output(file: Path) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # it is closed, or a notebook's
        return False


def _names(checkpoints: Sequence[Path]) -> list[str]:
    """Short names that tell them apart."""
    if len({str(path) for path in checkpoints}) < len(checkpoints):
        raise UserError("a checkpoint is named twice; name each once")
    for depth in range(1, 1 + max(len(path.absolute().parts) for path in checkpoints)):
        names = ["/".join(path.absolute().parts[-depth:]) for path in checkpoints]
        if len(set(names)) == len(names):
            return [shown(name) for name in names]
    return [shown(path) for path in checkpoints]


def _opened(flags: argparse.Namespace) -> "tuple[list[Document], Tasks | None]":
    """What is to be scored, before any model is opened.  Raises UserError."""
    documents, tasks = [], None
    if flags.text:
        from lfm.evaluation.text import read_documents

        documents = read_documents(flags.text)
    if flags.tasks:
        from lfm.evaluation.tasks import open_tasks

        names = [name for words in flags.tasks for name in words.split(",") if name]
        if not names:
            raise UserError("--tasks names no task; name some, as in --tasks stdlib_lines,gcide_words")
        with waiting("opening tasks"):
            tasks = open_tasks(names, flags.include_path or ())
    return documents, tasks


def _evaluate(
    name: str,
    path: Path,
    documents: "Sequence[Document]",
    tasks: "Tasks | None",
    flags: argparse.Namespace,
    config: EvaluateConfig,
) -> "Evaluated":
    from lfm.checkpoint.manifest import read_manifest
    from lfm.commands.evaluation_report import Evaluated
    from lfm.inference.load import open_model

    model, tokenizer, checkpoint = open_model(path, device=flags.device, int8=flags.int8)
    step = read_manifest(checkpoint, warn=False)["progress"]["step"]
    found = Evaluated(name, checkpoint, step, model.config.kind, model.config.count_parameters().total)
    if not documents and tasks is None:
        lines, found.held_out = _held_out(model, checkpoint, flags.data[0] if flags.data else None, config)
        print("\n".join(lines))
    if documents:
        from lfm.evaluation.text import WindowConfig, score_texts

        windows = WindowConfig(context=config.context, stride=config.stride)
        with waiting(f"scoring texts with {name}"):
            found.texts = score_texts(model, tokenizer, documents, windows, batch_size=config.batch_size)
    if tasks is not None:
        with waiting(f"scoring tasks with {name}"):
            found.tasks = tasks.evaluate(
                model, tokenizer, batch_size=config.batch_size, limit=config.limit, num_fewshot=config.num_fewshot
            )
    return found


def held_out(
    checkpoint: Path, *, data: Path | None, device: Device, config: EvaluateConfig, int8: bool = False
) -> Iterator[str]:
    """Lines of what a checkpoint's loss on a split is; `data` None: of the data set that its run names.

    Raises UserError for data of another tokenizer, whose ids mean something else, or of rows of another length.
    """
    from lfm.inference.load import open_model

    model, _, checkpoint = open_model(checkpoint, device=device, int8=int8)
    yield from _held_out(model, checkpoint, data, config)[0]


def _held_out(
    model: "LanguageModel", checkpoint: Path, data: Path | None, config: EvaluateConfig
) -> tuple[list[str], dict[str, Any]]:
    """Lines, and the same as JSON values."""
    from lfm.checkpoint.manifest import read_manifest
    from lfm.data.stream import DataConfig, open_split
    from lfm.evaluation.held_out import evaluate, score

    path = data or read_manifest(checkpoint, warn=False)["config"].get("data", {}).get("path")
    if path is None:
        raise UserError(f"{checkpoint} names no single data set that it was trained on; name one with --data DIR")
    c = model.config
    _check_data(expanded(path), config.split, checkpoint, c.seq_length)
    of_data = DataConfig(path=str(path), allow_smaller_tokenizer=True)
    rows = open_split(of_data, config.split, seq_length=c.seq_length, vocab_size=c.vocab_size)
    found = evaluate(
        functools.partial(score, model), rows, max_rows=config.max_rows or None, batch_rows=config.batch_size
    )
    read, perplexity = min(config.max_rows or len(rows), len(rows)), math.exp(min(found.loss, 700))
    lines = [
        f"{checkpoint}: {config.split} split of {path}, {read:,} of {len(rows):,} rows",
        f"loss {found.loss:.4f} nats over {found.labels:,} labels, perplexity {perplexity:.2f}",
    ]
    record: dict[str, Any] = {"data": str(path), "split": config.split, "rows": read, "labels": found.labels}
    record |= {"loss": found.loss, "perplexity": perplexity}
    if read == len(rows) and rows.index.text_bytes and not found.masked:
        bits = found.bits_per_byte(rows.index.text_bytes, c.vocab_size)
        unigram = found.unigram_bits_per_byte(rows.index.text_bytes)
        lines.append(f"{bits:.4f} bits per byte of text (unigram entropy of the same tokens {unigram:.4f})")
        record |= {"bits_per_byte": bits, "unigram_bits_per_byte": unigram}
    elif found.masked:
        lines.append("no bits per byte: a mask leaves parts of the text out of the loss")
    return lines, record


def _check_data(data: Path, split: str, checkpoint: Path, seq_length: int) -> None:
    from lfm.data.format import INDEX_NAME, TOKENIZER_NAME, read_index
    from lfm.data.tokenizer import Tokenizer

    own, of_data = checkpoint / TOKENIZER_NAME, data / TOKENIZER_NAME
    again = (
        "name data of the same by --data DIR, or prepare the text by "
        f"`lfm prepare FILE tokenizer.file={shlex.quote(str(own))} seq_length={seq_length} output=DIR`"
    )
    # What is missing is said when the split is opened.
    if exists(of_data) and Tokenizer.from_file(of_data).sha256 != Tokenizer.from_file(own).sha256:
        raise UserError(f"{shown(of_data)} is another tokenizer than the model's, {shown(own)}; {again}")
    if exists(data / split / INDEX_NAME):
        found = read_index(data / split)[0].seq_length
        if found != seq_length:
            raise UserError(f"{shown(data)} has rows of {found} ids and the model reads rows of {seq_length}; {again}")
