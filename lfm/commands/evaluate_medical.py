"""`lfm eval --medical`: how well a checkpoint and its heads know when they are wrong."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lfm.commands.medical_flags import check_as_calibrated, check_out, medical_of
from lfm.config import Config, Count
from lfm.errors import UserError
from lfm.files import ready_folder, refusing, shown, write_durably
from lfm.talk import waiting

if TYPE_CHECKING:
    from lfm.medical.questions import Part, Question


class MedicalEvaluationConfig(Config):
    splits: Count = 200
    """Of --medical: random splits over which violations of the certified risk are counted."""
    resamples: Count = 300
    """Of --medical: bootstrap draws of each interval."""
    evidence_questions: int = Field(default=100, ge=0, lt=1 << 31)
    """Of --medical: test questions whose evidence is drawn and judged; 0: none."""


def evaluate(flags: argparse.Namespace, config: MedicalEvaluationConfig, *, batch_size: int, max_rows: int) -> None:
    """Write the report beside the heads, or to --out, and print its main lines."""
    if len(flags.checkpoint) > 1 or flags.text or flags.tasks:
        raise UserError("--medical is of one checkpoint and goes with neither --text nor --tasks; leave the others out")
    check_as_calibrated(int8=flags.int8)
    if not flags.data:
        raise UserError("--medical needs sets of questions; name them with --data DIR")
    from lfm.evaluation.medical import ReportConfig, report
    from lfm.evaluation.medical_page import page
    from lfm.evaluation.medical_predictions import faithfulness, predict, to_lines
    from lfm.inference.load import open_model
    from lfm.medical import stored
    from lfm.medical.calibration import Certificate
    from lfm.medical.evidence import evidence
    from lfm.medical.fitting import check_apart
    from lfm.medical.questions import open_questions

    if flags.out is not None and flags.out.suffix in (".html", ".jsonl"):
        raise UserError(
            f"--out {shown(flags.out)} is where another file of the report goes; give a name that ends in .json"
        )
    found = open_questions(flags.data)
    tests = found.limited("test", max_rows).parts["test"]
    shifted: Sequence[Question] = []
    notes = found.words()
    if flags.shifted:
        other = open_questions(flags.shifted)
        shifted = other.limited("test", max_rows).parts["test"]
        if other.parts["test"] == found.parts["test"]:
            raise UserError("--shifted has the test questions of --data: nothing is shifted; give another set, or none")
        notes += [f"--shifted: {line}" for line in other.words()]
    model, tokenizer, checkpoint = open_model(flags.checkpoint[0], device=flags.device, int8=flags.int8)
    out = flags.out or stored.stored_at(checkpoint).with_suffix(".report.json")
    check_out(out, [*flags.data, *(flags.shifted or [])])
    if out.resolve() == stored.stored_at(checkpoint).resolve():
        raise UserError(f"--out {shown(out)} is where the heads are; give another file")
    safety_threshold = medical_of(flags, checkpoint).safety_threshold
    stored.open_calibrated(checkpoint, flags.task, model.embedding.weight.dtype)  # refuses what does not fit
    record, all_heads = stored.read(checkpoint)
    calibration = record.tasks[flags.task].calibration
    assert calibration is not None
    # The part may have been limited, by a hash of its groups.
    limited = found.limited("calibration", calibration.data.questions)
    if calibration.data.sha256 != limited.digest("calibration"):
        raise UserError(
            f"--data has another calibration part than the heads were calibrated on ({calibration.data.sha256[:8]}); "
            "give the same sets, or calibrate on these"
        )
    of_fit = record.tasks[flags.task].fit
    learnt: tuple[tuple[Part, Any], ...] = (("fit", of_fit), ("calibration", calibration.data))
    check_apart(tests, "test", *learnt)
    check_apart(shifted, "shifted", *learnt)
    asked = [("calibration", limited.parts["calibration"]), ("test", tests)]
    asked += [("shifted", shifted)] if flags.shifted else []
    predictions: list[dict[str, Any]] = []
    for part, questions in asked:
        with waiting(f"answering {len(questions):,} questions of the {part} part"):
            predictions += predict(
                model, tokenizer, questions, flags.task, all_heads[flags.task], part, batch_size=batch_size
            )
    certificate = Certificate(**calibration.certificate.model_dump())
    of_report = ReportConfig(
        risk=certificate.risk,
        delta=certificate.delta,
        safety_threshold=safety_threshold,
        splits=config.splits,
        resamples=config.resamples,
    )
    with waiting("measuring"):
        measures = report(predictions, {**calibration.by_head}, certificate, of_report)
    measures["data_notes"] = notes
    measures["checkpoint"], measures["task"] = str(checkpoint), flags.task
    measures["calibrated_on"] = calibration.data.model_dump(exclude={"group_hashes"})
    measures["fitted_on"] = of_fit.model_dump(exclude={"group_hashes"})
    measures["cost"] = record.tasks[flags.task].cost.model_dump()
    shown_evidence = ""
    if config.evidence_questions:
        of_tests = [row for row in predictions if row["part"] == "test"]
        chosen = of_tests[:: max(1, len(tests) // config.evidence_questions)][: config.evidence_questions]
        texts = tests[:: max(1, len(tests) // config.evidence_questions)][: config.evidence_questions]
        pairs = [(question.text, " " + row["answer"]) for question, row in zip(texts, chosen, strict=True)]
        try:
            with waiting("drawing evidence"):
                spans = evidence(model, tokenizer, pairs, batch_size=batch_size)
            measures["evidence"] = faithfulness(spans)
            from lfm.commands.medical import evidence_html

            shown_evidence = "<h2>Some questions</h2>" + "".join(evidence_html(each) for each in spans[:10])
        except UserError as error:  # a family without driven recurrences
            measures["evidence"] = {"questions": 0, "why": str(error)}
    _write(out, measures, page(f"Medical mode: {shown(checkpoint)}", measures, shown_evidence), to_lines(predictions))
    print("\n".join(lines(measures)))
    print(f"{out}\n{out.with_suffix('.html')}\n{out.with_suffix('.predictions.jsonl')}")


def _write(out: Path, measures: dict[str, Any], content: str, predictions: bytes) -> None:
    with refusing("give another file with --out FILE"):
        ready_folder(out.parent)
        write_durably(out.with_suffix(".predictions.jsonl"), predictions)
        write_durably(out.with_suffix(".html"), content.encode())
        write_durably(out, json.dumps(measures, indent=1, allow_nan=False).encode() + b"\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The main numbers."""

    def of(name: str, key: str) -> str:
        value = found["measures"][name][key][0]
        return "-" if value is None else f"{value:.4f}"

    said = [f"accuracy {found['accuracy']['test']:.4f} on {found['questions']['test']:,} test questions"]
    for name in found["measures"]:
        said.append(
            f"{name:<28} AUROC {of(name, 'auroc')}  ECE {of(name, 'ece')}  Brier {of(name, 'brier')}  NLL "
            f"{of(name, 'nll')}  coverage at 5 % risk {of(name, 'coverage_at_5_percent_risk')}"
        )
    at, v = found["at_applied_threshold"], found["violations"]
    applied, certified = found["applied_threshold"], found["certificate"]["threshold"]
    said.append(
        f"threshold: asked for {found['safety_threshold']:g}, certified "
        f"{'none' if certified is None else format(certified, '.4f')}, applied "
        f"{'none: nothing is answered' if applied is None else format(applied, '.4f')}; {at['answered']:,} answered, "
        f"{at['wrong']:,} of them wrong"
    )
    said.append(
        f"of {v['splits']} splits {v['certified']} certified a threshold, whose risk was exceeded in {v['violated']} "
        f"(at most a share of {v['allowed']:.3f} is allowed)"
    )
    if "shifted" in found:
        s = found["shifted"]
        risk = s["at_certified_threshold"]["risk"]
        said.append(
            f"shifted to {', '.join(s['sources'])}: the guarantee is void; ECE {s['ece']:.4f}, risk at the certified "
            f"threshold {'- (nothing answered)' if risk is None else format(risk, '.4f')}"
        )
    return [*said, *found.get("data_notes", ()), found["note"]]
