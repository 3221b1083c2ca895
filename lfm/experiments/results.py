"""What runs of a set have found: each finished run, each arm over its seeds, and the table of all."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lfm.data.consumed import CONSUMED_NAME, read_record
from lfm.errors import UserError
from lfm.evaluation.plasticity import Probe, compare
from lfm.experiments.ablation import PILOT, TEXT, AblationConfig, Planned
from lfm.experiments.matching import Size
from lfm.experiments.probes import CHANCE, PROBES
from lfm.files import exists, read_file, shown
from lfm.models.liquidnn import MiniLiquidGPT
from lfm.training.metrics_file import read_metrics

FINISHED = "finished.json"
"""In a run folder: that it is trained and measured, and what was measured."""
_MOST_POINTS = 200
"""Of a curve of training losses in a result."""
AGAIN = "put it back, or remove the run's folder, and it is trained again"


class Finished(BaseModel):
    """What FINISHED holds, as `lfm.experiments.work` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    diverged: str | None
    """Why, of a run whose loss was no number."""
    wall_seconds: float = Field(ge=0)
    shares_gpu: bool = False
    """Whether other runs were under way on its GPU."""
    accuracy: float = Field(default=0.0, ge=0, le=1)
    """Of a probe, on held-out rows."""
    accuracy_longer: float = Field(default=0.0, ge=0, le=1)
    """On documents longer than those of training."""
    plasticity: list[Probe] = []


class _Record(BaseModel):
    """A line of metrics.jsonl, as far as it is read here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int = Field(ge=1, lt=1 << 31)
    tokens: int = Field(ge=0, lt=1 << 62)


class _Step(_Record):
    cross_entropy: float
    tokens_per_second: float = Field(default=1.0, gt=0)
    memory_gib: float = Field(default=0.0, ge=0)


class _Validation(_Record):
    validation_loss: float  # of what is certain, below 0 by rounding
    validation_bits_per_byte: float | None = None


@dataclass(frozen=True)
class Result:
    """A finished run."""

    planned: Planned
    finished: dict[str, Any]
    """What the file says that `lfm.experiments.work` leaves."""
    validation: list[dict[str, Any]]
    """Records of metrics.jsonl with `validation_loss`."""
    losses: list[list[float]]
    """Tokens and training cross entropy."""
    windows: list[tuple[int, float]]
    """Tokens at the end of each logged window, and seconds until then."""
    tokens_per_second: float | None
    memory_gib: float | None
    rows: list[str] = field(default_factory=list)
    """What each step consumed, as chained digests: equal ends mean equal histories."""

    @property
    def diverged(self) -> bool:
        return self.finished["diverged"] is not None

    @property
    def shares_gpu(self) -> bool:
        """Whether other runs were under way on its GPU."""
        return self.finished.get("shares_gpu", False)

    @property
    def loss(self) -> float:
        """Held out, nats per label; infinite of a run that diverged."""
        return math.inf if self.diverged or not self.validation else self.validation[-1]["validation_loss"]

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.diverged or not self.validation else self.validation[-1].get("validation_bits_per_byte")

    @property
    def loss_by_mode(self) -> dict[str, float]:
        """Of a family that is validated in several ways, such as with plasticity off and on."""
        last = {} if self.diverged or not self.validation else self.validation[-1]
        modes = MiniLiquidGPT.evaluation_modes
        return {mode: last[f"validation_loss_{mode}"] for mode in modes if f"validation_loss_{mode}" in last}

    @property
    def tokens(self) -> int:
        return self.windows[-1][0] if self.windows else 0

    @property
    def seconds(self) -> float:
        return self.windows[-1][1] if self.windows else 0.0

    def seconds_at(self, tokens: int) -> float:
        """Of training until then."""
        return next((seconds for at, seconds in self.windows if at >= tokens), self.seconds)

    def stored(self) -> dict[str, Any]:
        """As JSON values."""
        thinned = self.losses[:: max(1, len(self.losses) // _MOST_POINTS)]
        return {
            "task": self.planned.task,
            "arm": self.planned.arm,
            "rate": None if self.planned.untrained else self.planned.rate,
            "seed": self.planned.seed,
            "steps": self.planned.run.training.steps,
            "tokens": self.tokens,
            "held_out_loss": None if math.isinf(self.loss) else self.loss,
            "bits_per_byte": self.bits_per_byte,
            **({"held_out_by_mode": self.loss_by_mode} if self.loss_by_mode else {}),
            "diverged": self.finished["diverged"],
            "rows": self.rows[-1] if self.rows else None,
            "validation": [
                [r["tokens"], r["validation_loss"], r.get("validation_bits_per_byte")] for r in self.validation
            ],
            "training": thinned,
            **{key: self.finished[key] for key in ("accuracy", "accuracy_longer") if key in self.finished},
            # What another machine, or another day, gives otherwise.
            "speed": {
                "tokens_per_second": self.tokens_per_second,
                "shares_gpu": self.shares_gpu,
                "seconds": self.seconds,
                "seconds_of_validations": [self.seconds_at(r["tokens"]) for r in self.validation],
                "memory_gib": self.memory_gib,
            },
        }


def read_result(planned: Planned) -> Result | None:
    """None: the run is not finished.  Raises UserError for files of it that cannot be read."""
    folder = planned.folder
    if not exists(folder / FINISHED):
        return None
    try:
        told = Finished.model_validate_json(read_file(folder / FINISHED))
        measured = {"accuracy", "accuracy_longer"} & told.model_fields_set
        if told.diverged is None and len(measured) != (2 if planned.task in PROBES else 0):
            raise ValueError
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{shown(folder / FINISHED)} is damaged; remove it, and the run is finished again") from None
    steps, validations = _history(planned, diverged=told.diverged is not None)
    rates = [r["tokens_per_second"] for r in steps[1:] or steps if "tokens_per_second" in r]
    names = [path.name.removeprefix("step_") for path in folder.glob("starts/step_*")]
    return Result(
        planned,
        told.model_dump(exclude_unset=True),
        validations,
        [[r["tokens"], r["cross_entropy"]] for r in steps],
        _windows(steps, {int(name) for name in names if name.isdecimal()}),
        statistics.median(rates) if rates else None,
        max((r["memory_gib"] for r in steps if "memory_gib" in r), default=None),
        _rows(planned, diverged=told.diverged is not None),
    )


def _history(planned: Planned, *, diverged: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of training and of validations.  Raises UserError where a finished run must have others."""
    file, run = planned.folder / "metrics.jsonl", planned.run
    try:
        records = read_metrics(file) if exists(file) else []
        steps = [r for r in records if "cross_entropy" in r]
        validations = [r for r in records if "validation_loss" in r]
        for of, kind in ((steps, _Step), (validations, _Validation)):
            for record in of:
                kind.model_validate(record)
            found = [record["step"] for record in of]
            if found != sorted(set(found)):
                raise ValueError
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{shown(file)} is damaged; {AGAIN}") from None
    for of, every in ((steps, run.logging.every_steps), (validations, run.validation.every_steps)):
        wanted = {*(range(every, run.training.steps, every) if every else ()), run.training.steps}
        missing = sorted(wanted - {record["step"] for record in of})
        if missing and not diverged:
            what = "training" if of is steps else "a validation"
            raise UserError(f"{shown(file)} lacks the record of {what} at step {missing[0]}; {AGAIN}")
    return steps, validations


def _rows(planned: Planned, *, diverged: bool) -> list[str]:
    """What each step consumed.  Raises UserError for a record of other steps than the run has made."""
    file = planned.folder / CONSUMED_NAME
    entries = []
    with suppress(UserError):  # whose way out is another
        entries = read_record(planned.folder) if exists(file) else []
    found = [entry.step for entry in entries]
    if found != [*range(1, len(found) + 1)] or (len(found) != planned.run.training.steps and not diverged):
        raise UserError(f"{shown(file)} does not hold the steps from 1 to {planned.run.training.steps}; {AGAIN}")
    return [entry.chain for entry in entries]


def _windows(steps: Sequence[Mapping[str, Any]], starts: set[int]) -> list[tuple[int, float]]:
    """Tokens and seconds at each record.

    The first window after a start, which compiles kernels, takes the speed of the one behind it; validation and saving
    are in no window.
    """
    found, before, seconds = [], {"step": 0, "tokens": 0}, 0.0
    for i, record in enumerate(steps):
        is_first = before["step"] in starts and i + 1 < len(steps)
        rate = (steps[i + 1] if is_first else record).get("tokens_per_second")
        if rate:
            seconds += (record["tokens"] - before["tokens"]) / rate
        found.append((record["tokens"], seconds))
        before = record
    return found


def check_same_rows(results: Sequence[Result]) -> None:
    """Raises UserError where two runs of a task and a seed read different rows, or the same in another order."""
    references: dict[tuple[str, int], Result] = {}
    for result in results:
        if not result.rows or result.planned.untrained:
            continue
        key = (result.planned.task, result.planned.seed)
        reference = references.setdefault(key, result)
        if len(result.rows) > len(reference.rows):
            references[key] = result
        both = min(len(result.rows), len(reference.rows))
        if result.rows[both - 1] != reference.rows[both - 1]:
            step = next(i for i in range(both) if result.rows[i] != reference.rows[i]) + 1
            one, other = shown(result.planned.folder), shown(reference.planned.folder)
            raise UserError(
                f"the runs {one} and {other} read different rows from step {step} on: their data was changed in "
                "between; remove the folder of the one that read the wrong rows"
            )


def best_rate(results: Sequence[Result]) -> float | None:
    """Of those with one seed, the rate with the lowest held-out loss, the lower of equal ones; None: all diverged."""
    found = [(result.loss, result.planned.rate) for result in results if not math.isinf(result.loss)]
    return min(found)[1] if found else None


def report(
    ablation: AblationConfig, sizes: Mapping[str, Size], wanted: Sequence[Planned], results: Sequence[Result]
) -> dict[str, Any]:
    """What RESULT.json holds: of all finished runs, of each arm, and what is missing."""
    done = {result.planned.folder for result in results}
    return {
        "name": ablation.name,
        "match": ablation.match.model_dump(mode="json"),
        "seeds": list(ablation.seeds),
        "complete": not [planned for planned in wanted if planned.folder not in done],
        "missing": [planned.label for planned in wanted if planned.folder not in done],
        "arms": [_arm(ablation, arm, sizes[arm], results) for arm in ablation.arms],
        "runs": [result.stored() for result in results if result.planned.task != PILOT],
        "environment": _environment(results),
    }


def _arm(ablation: AblationConfig, arm: str, size: Size, results: Sequence[Result]) -> dict[str, Any]:
    first, rates = ablation.seeds[0], ablation.rates_of(arm)
    own = [result for result in results if result.planned.arm == arm]
    text = [result for result in own if result.planned.task == TEXT]
    sweep = [result for result in text if result.planned.seed == first and result.planned.rate in rates]
    whole = len(sweep) == len(rates)
    best = best_rate(sweep) if whole else None
    at_best = sorted((r for r in text if r.planned.rate == best), key=lambda r: ablation.seeds.index(r.planned.seed))
    good = [result for result in at_best if not math.isinf(result.loss)]
    # All rates take the same time.
    timed = [result for result in text if not result.diverged and not result.shares_gpu] or good
    found: dict[str, Any] = {
        "name": arm,
        "config": ablation.arms[arm].config,
        **size.stored(),
        "untrained": ablation.arms[arm].untrained,
        "sweep": [[r.planned.rate, None if math.isinf(r.loss) else r.loss] for r in sweep],
        "best_rate": best,
        # A rate beyond the sweep may be better: the arm is then judged too hard.
        "best_is_at_an_edge": best is not None and len(rates) > 1 and best in (rates[0], rates[-1]),
        "diverged": sum(result.diverged for result in at_best),
        "held_out_loss": _band([result.loss for result in good]),
        "bits_per_byte": _band([r.bits_per_byte for r in good if r.bits_per_byte is not None]),
        "steps": at_best[0].planned.run.training.steps if at_best else None,
        "tokens": at_best[0].tokens if at_best else None,
        "speed": {
            "tokens_per_second": _median([r.tokens_per_second for r in timed if r.tokens_per_second]),
            "seconds": _median([r.seconds for r in timed]),
            "shares_gpu": any(r.shares_gpu for r in timed),
            "memory_gib": max((r.memory_gib for r in good if r.memory_gib is not None), default=None),
        },
        "probes": {},
    }
    for task in ablation.tasks[1:]:
        tried = [result for result in own if result.planned.task == task]
        rate = best_rate(tried)
        if len(tried) == len(rates) and rate is not None:
            chosen = next(result for result in tried if result.planned.rate == rate)
            kept = {key: chosen.finished[key] for key in ("accuracy", "accuracy_longer")}
            found["probes"][task] = {"rate": rate, **kept, "chance": CHANCE[task]}
    modes = [result.loss_by_mode for result in good]
    if any(modes):
        found["held_out_by_mode"] = {mode: _band([each[mode] for each in modes]) for mode in modes[0]}
    words = [Probe(**word) for result in good for word in result.finished.get("plasticity", ())]
    if words:
        comparisons = compare(words, seed=0)
        found["plasticity"] = [
            {"condition": c.condition, "control": c.control, "change": c.change, "interval": list(c.interval)}
            for c in comparisons
        ]
    return found


def _band(values: Sequence[float]) -> dict[str, Any] | None:
    """Over seeds."""
    if not values:
        return None
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "seeds": len(values)}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _environment(results: Sequence[Result]) -> dict[str, Any] | None:
    """Of the first run."""
    for result in results:
        file = result.planned.folder / "environment.json"
        if exists(file):
            try:
                found = json.loads(read_file(file))
                return {key: value for key, value in found.items() if key != "command"}
            except UserError:
                raise
            except (ValueError, RecursionError, AttributeError):
                raise UserError(f"{shown(file)} is damaged; {AGAIN}") from None
    return None


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a RESULT.json, the arm with the lowest loss first, and what is to be said of it."""
    arms = sorted(result["arms"], key=lambda arm: arm["held_out_loss"]["mean"] if arm["held_out_loss"] else math.inf)
    probes = list(dict.fromkeys(task for arm in arms for task in arm["probes"]))
    lines = [
        "| arm | parameters: active without embedding, total, frozen | MFLOP a token | best learning rate | "
        "held-out loss, nats (lowest to highest seed) | bits per byte | tokens/s | seconds |",
        "| --- " * 8 + "|",
    ]
    for arm in arms:
        counts = ", ".join(f"{arm[key]:,}" for key in ("active_non_embedding", "total", "frozen"))
        speed, shared = arm["speed"], " (shared)" if arm["speed"].get("shares_gpu") else ""
        cells = [
            arm["name"],
            counts,
            f"{arm['flops_per_token'] / 1e6:,.2f}",
            _rate(arm),
            _band_text(arm["held_out_loss"]) + (f"; {arm['diverged']} diverged" if arm["diverged"] else ""),
            _band_text(arm["bits_per_byte"]),
            f"{speed['tokens_per_second']:,.0f}{shared}" if speed["tokens_per_second"] else "",
            f"{speed['seconds']:,.1f}{shared}" if speed["seconds"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if probes:
        lines += ["", f"| arm | {' | '.join(f'{task}: same sizes, longer' for task in probes)} |"]
        lines.append("| --- " * (len(probes) + 1) + "|")
        for arm in arms:
            cells = [_accuracy(arm["probes"].get(task)) for task in probes]
            lines.append(f"| {arm['name']} | {' | '.join(cells)} |")
        chance = ", ".join(f"{task} {CHANCE[task]:.1%}" for task in probes)
        lines += ["", f"Share of right answers at the rate with the lowest held-out loss, one seed; chance: {chance}."]
    if any("plasticity" in arm for arm in arms):
        lines += ["", *_plasticity(arms)]
    lines += ["", *_notes(result)]
    return "\n".join(lines)


def _rate(arm: Mapping[str, Any]) -> str:
    if arm["untrained"]:
        return "untrained"
    if arm["best_rate"] is None:
        return "all diverged" if arm["sweep"] and all(loss is None for _, loss in arm["sweep"]) else ""
    return f"{arm['best_rate']:g}" + (" (edge)" if arm["best_is_at_an_edge"] else "")


def _band_text(band: Mapping[str, Any] | None) -> str:
    if band is None:
        return ""
    return f"{band['mean']:.4f}" + (f" ({band['low']:.4f} to {band['high']:.4f})" if band["seeds"] > 1 else "")


def _accuracy(found: Mapping[str, Any] | None) -> str:
    return f"{found['accuracy']:.1%}, {found['accuracy_longer']:.1%}" if found else ""


def _plasticity(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """By arm: held-out loss with plasticity off and on, and what reading does to a word's own meaning."""
    told = [arm for arm in arms if "plasticity" in arm]
    names = [f"{c['condition']} against {c['control']} (99%)" for c in told[0]["plasticity"]]
    modes = [mode.replace("_", " ") for mode in told[0]["held_out_by_mode"]]
    heads = ["arm", *(f"held-out loss, {mode}" for mode in modes), *names]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for arm in told:
        cells = [arm["name"], *map(_band_text, arm["held_out_by_mode"].values())]
        for c in arm["plasticity"]:
            gain, low, high = map(math.expm1, (c["change"], *c["interval"]))
            cells.append(f"{gain:+.2%} ({low:+.2%} to {high:+.2%})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(result: Mapping[str, Any]) -> list[str]:
    edges = [arm["name"] for arm in result["arms"] if arm["best_is_at_an_edge"]]
    tokens = sorted({arm["tokens"] for arm in result["arms"] if arm["tokens"] and not arm["untrained"]})
    notes = []
    if tokens:
        counts = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        notes.append(f"{counts} tokens a run; seeds {', '.join(map(str, result['seeds']))}.")
    if any(arm["speed"].get("shares_gpu") for arm in result["arms"]):
        notes.append("(shared): no run of the arm had its GPU for itself.")
    if edges:
        notes.append(f"At an edge of its learning rates, beyond which a better one may lie: {', '.join(edges)}.")
    if result["missing"]:
        count = len(result["missing"])
        notes.append(f"Not complete: of the runs known to be wanted, {count} {'is' if count == 1 else 'are'} missing.")
    environment = result["environment"]
    if environment:
        where = environment["gpu"] or f"{environment['cpu_threads']} CPU threads"
        notes.append(f"On {where}, torch {environment['versions']['torch']}, commit {_short(environment['commit'])}.")
    return [" ".join(notes)]


def write_files(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Names and contents of what is left in the set's folder beside the pictures."""
    text = json.dumps(result, indent=1)
    return {"RESULT.json": text.encode() + b"\n", "RESULT.md": markdown(result).encode() + b"\n"}


def read_report(path: Path) -> dict[str, Any]:
    """A RESULT.json.  Raises UserError."""
    try:
        return json.loads(read_file(path))
    except ValueError:
        raise UserError(f"{shown(path)} is no result of lfm ablate; give a RESULT.json") from None


def _short(commit: object) -> str:
    """Of a commit's name; that files were changed beside it stays told."""
    whole, changed, _ = str(commit).partition("-dirty")
    return whole[:12] + changed
