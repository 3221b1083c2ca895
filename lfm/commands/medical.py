"""Medical mode: `lfm medical fit|calibrate|lines|evidence ...`: heads that know when an answer is likely to be wrong.

Not a medical device: see docs/medical.md.
"""

import argparse
import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lfm.commands.medical_flags import check_out
from lfm.config import Config, Rows, add_flags, from_flags, path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import ready_folder, refusing, write_durably
from lfm.talk import waiting

if TYPE_CHECKING:
    from lfm.medical.evidence import Evidence, Method
    from lfm.medical.questions import Task

_BY = {"drive": "gradient times drive", "embedding": "gradient times embedding", "attention": "attention weights"}
"""What can rank the spans of a question."""


class FitConfig(Config):
    batch_size: Rows = 32
    """Questions read at once; no result depends on it but for rounding."""
    max_questions: int = Field(default=0, ge=0, lt=1 << 31)
    """Only the first so many of the part; 0: all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the head's initial weights."""


class CalibrateConfig(Config):
    risk: float = Field(default=0.05, gt=0, lt=1)
    """Largest share of wrong answers among those that are given, to be certified."""
    delta: float = Field(default=0.05, gt=0, lt=1)
    """Probability, over draws of calibration questions, that the certificate fails."""
    batch_size: Rows = 32
    """Questions read at once; no result depends on it but for rounding."""
    max_questions: int = Field(default=0, ge=0, lt=1 << 31)
    """Only the first so many of the part; 0: all."""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Heads that estimate whether a model's answer is right.  Not a medical device, and no claim of "
        "clinical validity."
    )
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    lines = words.add_parser("lines", help="write the training part of sets of questions as prompts and completions")
    fit = words.add_parser("fit", help="fit the heads on the model's right and wrong answers")
    calibrate = words.add_parser("calibrate", help="temperature, and a threshold with a guarantee")
    evidence = words.add_parser("evidence", help="which parts of a question moved the answer, and how faithful that is")
    for word in (fit, calibrate, evidence):
        word.add_argument(
            "--checkpoint", required=True, type=path_flag, metavar="RUN_OR_STEP", help="run or step_* folder"
        )
        word.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for word in (lines, fit, calibrate):
        word.add_argument(
            "--data",
            required=True,
            action="append",
            type=path_flag,
            metavar="DIR",
            help="of data_pipeline.labelled, MedMCQA, MedQA or PubMedQA; may be given several times",
        )
    for word in (fit, calibrate):
        word.add_argument(
            "--task",
            choices=("choice", "text"),
            default="choice",
            help="answers are chosen from the options by likelihood, or free text judged by equal words",
        )
    lines.add_argument("--out", required=True, type=path_flag, metavar="FILE", help="JSON lines for labels=completion")
    evidence.add_argument("--prompt", required=True, action="append", metavar="TEXT")
    evidence.add_argument("--option", action="append", metavar="TEXT", help="an answer to choose from")
    evidence.add_argument("--by", choices=tuple(_BY), default="drive", help="what ranks the spans; all are measured")
    evidence.add_argument("--out", type=path_flag, metavar="FILE", help="an HTML page")
    add_flags(fit, FitConfig)
    add_flags(calibrate, CalibrateConfig)
    flags = parser.parse_args()
    {"lines": _lines, "fit": _fit, "calibrate": _calibrate, "evidence": _evidence}[flags.word](flags)


def _lines(flags: argparse.Namespace) -> None:
    from lfm.medical.questions import open_questions

    questions = open_questions(flags.data).parts["training"]
    check_out(flags.out, flags.data)
    rows = [{"prompt": question.text, "completion": question.completion} for question in questions]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with refusing("give another file with --out FILE"):
        ready_folder(flags.out.parent)
        write_durably(flags.out, content.encode())
    print(f"{flags.out}: {len(rows):,} questions of the training part")


def _fit(flags: argparse.Namespace) -> None:
    config = from_flags(FitConfig, flags)
    from lfm.export.packages import require
    from lfm.files import exists
    from lfm.inference.load import open_model
    from lfm.medical import stored
    from lfm.medical.answering import answer
    from lfm.medical.fitting import fit_heads, fitted
    from lfm.medical.questions import open_questions

    require("safetensors.torch", purpose="storing a head", extra="medical")
    everything = open_questions(flags.data)
    found = everything.limited("fit", config.max_questions)
    for line in everything.words():
        print(line)
    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device)
    ready_folder(stored.stored_at(checkpoint).parent)
    dtype = stored.dtype_name(model.embedding.weight.dtype)
    questions = found.parts["fit"]
    with waiting(f"answering {len(questions):,} questions"):
        answered = answer(model, tokenizer, questions, flags.task, batch_size=config.batch_size)
    heads = fit_heads(answered, questions, seed=config.seed)
    tasks, others = {}, {}
    if exists(stored.stored_at(checkpoint)):
        try:
            record, others = stored.read(checkpoint)
            if record.dtype == dtype:
                tasks = dict(record.tasks)
            else:
                print(f"all heads stored here before are dropped: they read {record.dtype}, and this model has {dtype}")
        except UserError as error:  # of other weights, or damaged
            others = {}
            print(f"all heads stored here before are dropped: {error}")
    tasks[flags.task] = fitted(heads, answered, found, model.config)
    kept = {task: of for task, of in others.items() if task in tasks}
    path = stored.write(checkpoint, tasks, {**kept, flags.task: heads}, dtype)
    of = tasks[flags.task]
    print(f"{path}: {of.fit.questions:,} questions of {', '.join(of.fit.sources)}, accuracy {of.fit.accuracy:.3f}")
    print(f"the head has {heads['correct'].config.num_parameters:,} parameters and {of.cost.share:.2e} of the FLOPs")
    print(f"not calibrated yet: lfm medical calibrate --checkpoint {flags.checkpoint} --task {flags.task} --data DIR")


def _calibrate(flags: argparse.Namespace) -> None:
    config = from_flags(CalibrateConfig, flags)
    from lfm.inference.load import open_model
    from lfm.medical import stored
    from lfm.medical.answering import answer
    from lfm.medical.calibration import check_size
    from lfm.medical.fitting import calibrated, check_apart, group_names, halves
    from lfm.medical.questions import open_questions
    from lfm.medical.selective import percent

    everything = open_questions(flags.data)
    found = everything.limited("calibration", config.max_questions)
    for line in everything.words():
        print(line)
    questions = found.parts["calibration"]
    tested = len(halves(group_names(questions)).certificate)
    check_size(tested, risk=config.risk, delta=config.delta, source="the calibration part")
    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device)
    record, heads = stored.read(checkpoint)
    dtype = stored.dtype_name(model.embedding.weight.dtype)
    if flags.task not in record.tasks:
        raise UserError(
            f"{stored.stored_at(checkpoint)} has no head for answers of kind {flags.task}; fit it first: lfm medical "
            f"fit --task {flags.task}"
        )
    if record.dtype != dtype:
        raise UserError(
            f"the heads were fitted in {record.dtype}, and the model computes in {dtype} here; fit them here"
        )
    check_apart(questions, "calibration", ("fit", record.tasks[flags.task].fit))
    with waiting(f"answering {len(questions):,} questions"):
        answered = answer(model, tokenizer, questions, flags.task, batch_size=config.batch_size)
    of_task = calibrated(heads[flags.task], answered, found, risk=config.risk, delta=config.delta)
    tasks: dict[Task, stored.TaskHeads] = {**record.tasks}
    tasks[flags.task] = record.tasks[flags.task].model_copy(update={"calibration": of_task})
    path = stored.write(checkpoint, tasks, heads, dtype)
    c = of_task.certificate
    print(f"{path}: {of_task.data.questions:,} questions, accuracy {of_task.data.accuracy:.3f}")
    if c.threshold is None:
        print(f"no threshold could be certified for a risk of {percent(c.risk)}: in medical mode nothing is answered")
    else:
        print(
            f"certified threshold {c.threshold:.4f}: {c.answered:,} of {c.questions:,} questions answered, {c.wrong} "
            f"wrong; risk at most {percent(c.risk)} with confidence {percent(1 - c.delta)} for questions like these"
        )


def _evidence(flags: argparse.Namespace) -> None:
    from lfm.inference.load import open_model
    from lfm.medical.answering import answer
    from lfm.medical.asking import check_options
    from lfm.medical.evidence import evidence
    from lfm.medical.questions import Question

    check_options(flags.option or ())
    options = tuple(f" {option}" for option in flags.option or ())
    model, tokenizer, _ = open_model(flags.checkpoint, device=flags.device)
    questions = [Question(text, options or ("",), 0, "", "", "", "") for text in flags.prompt]
    answered = answer(model, tokenizer, questions, "choice" if options else "text")
    asked = [(q.text, f" {text}") for q, text in zip(questions, answered.answers, strict=True)]
    found = evidence(model, tokenizer, asked)
    for each in found:
        print("\n".join(evidence_lines(each, flags.by)))
    if len(found) < len(asked):
        print(f"{len(asked) - len(found)} prompts are one word, of which no part can be the evidence")
    if flags.out is not None:
        with refusing("give another file with --out FILE"):
            ready_folder(flags.out.parent)
            write_durably(flags.out, evidence_page(found, flags.by).encode())
        print(flags.out)


def evidence_lines(each: "Evidence", by: "Method" = "drive", top: int = 5) -> list[str]:
    """The spans that moved the answer most, and how faithful that is beside other ways to choose them."""
    lines = [f"{each.text!r} -> {each.answer.strip()!r}, whose probability of being right nothing has judged here"]
    lines += [f"{score:+9.4f}  {span.text.strip()}" for score, span in each.ranked(by)[:top]]
    lines += [
        f"  {method:<10} comprehensiveness {more:+.4f}  sufficiency {less:+.4f}"
        for method, (more, less) in each.faithfulness.items()
    ]
    return lines


def evidence_page(found: "Sequence[Evidence]", by: "Method" = "drive") -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>evidence</title>"
        "<style>body{font:15px/1.6 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em}"
        "td,th{padding:.2em .8em;text-align:left}</style><h1>What moved the answers</h1>"
        f"<p>It is what moved the model, by {_BY[by]}: no reason and no source. Not a medical device.</p>"
    ]
    return "".join([*parts, *(evidence_html(each, by) for each in found)])


def evidence_html(each: "Evidence", by: "Method" = "drive") -> str:
    """A question with its spans shaded by their scores, and the faithfulness numbers."""
    scores = each.scores_by(by)
    largest = max(1e-12, float(abs(scores).max()))
    shown, at = [], 0
    for span, score in zip(each.spans, scores, strict=True):
        colour = "255,150,0" if score > 0 else "80,130,255"
        shown.append(html.escape(each.text[at : span.start]))
        shown.append(
            f"<span style='background:rgba({colour},{abs(score) / largest:.2f})' title='{score:+.4f}'>"
            f"{html.escape(span.text)}</span>"
        )
        at = span.end
    rows: list[Any] = [
        f"<tr><td>{method}<td>{more:+.4f}<td>{less:+.4f}" for method, (more, less) in each.faithfulness.items()
    ]
    return (
        f"<h2>{html.escape(each.answer.strip())}</h2><p>{''.join(shown)}{html.escape(each.text[at:])}</p>"
        "<table><tr><th>spans chosen by<th>comprehensiveness (more is better)<th>sufficiency (less is better)"
        f"{''.join(rows)}</table>"
    )
