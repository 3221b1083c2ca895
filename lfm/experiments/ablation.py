"""A set of arms to be compared on equal terms: its YAML, and the ordinary run that each arm, rate and seed is."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator
from typing_extensions import Self

from lfm.config import Config, Count, CountOrZero, PathText, Rows
from lfm.errors import UserError
from lfm.experiments.probes import PROBES, SEQ_LENGTH, VOCAB_SIZE, Probe
from lfm.files import expanded
from lfm.training.run import RunConfig

TEXT, PILOT = "text", "pilot"
"""Tasks beside the probes: the set's own data; a few steps that say how fast an arm is."""
PILOT_STEPS = 50
UNTRAINED_RATE = 1e-12
"""Of the one step of an arm that is not trained: no weight that is not tiny moves by it."""


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError(f"{text!r} becomes the name of a folder, and a part of a key; take letters, digits, _ and -")
    return text


Name = Annotated[str, AfterValidator(_is_name)]


class MatchConfig(Config):
    by: Literal["parameters", "flops", "seconds"] = "parameters"
    """What all arms have alike: active parameters outside of embedding and head; FLOPs of a training token, forward
    and backward; or seconds of training, for which a pilot of each arm measures its speed."""
    tolerance: float = Field(default=0.02, ge=0, lt=1)
    """How far an arm may be from the first one, as a share of it; parameters and flops."""
    seconds: float | None = Field(default=None, gt=0, le=10_000_000)
    """Of training by each run, with by: seconds; 10 steps at least."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.by == "seconds") != (self.seconds is not None):
            raise ValueError(
                f"by={self.by} and seconds={self.seconds} do not go together; give seconds with by=seconds"
            )
        return self


class ArmConfig(Config):
    config: PathText
    """Run file, or the name of a shipped one: the arm's model and its own recipe."""
    set: dict[str, Any] = Field(default={})
    """What differs from it and from `common`, as in a run file."""
    rates: tuple[PositiveFloat, ...] = ()
    """Its learning rates (optimizer.lr); none: the set's."""
    untrained: bool = False
    """As the seed makes it: a control without a sweep, which sees one step at a rate of nothing."""


class ProbesConfig(Config):
    """Trainings on made-up sequences, where a right answer needs recall or a tracked state."""

    tasks: tuple[Probe, ...] = Field(default=PROBES, min_length=1)
    steps: Count = 1000
    global_batch_size: Rows = 64
    """Rows of an optimizer step, of 128 ids each; no row comes twice."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[Probe, ...]) -> tuple[Probe, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks={list(tasks)} names one twice; leave it out")
        return tasks


class AblationConfig(Config):
    name: Name
    """Folder under `output`."""
    output: PathText = "runs/ablation"
    common: dict[str, Any]
    """Of every arm, over its own file, as in a run file: data, rows, batch, schedule, validation, checkpoints."""
    tokens: Count = 10_000_000
    """Of training by each run, unless match.by=seconds; rounded up to whole steps."""
    rates: tuple[PositiveFloat, ...] = ()
    """Learning rates (optimizer.lr) of every arm that has no own ones; each with the first seed."""
    seeds: tuple[CountOrZero, ...] = Field(default=(1, 2, 3), min_length=1)
    """Of initialisation and data order; the best rate of an arm is trained with all of them."""
    match: MatchConfig = MatchConfig()
    arms: dict[Name, ArmConfig] = Field(min_length=1)
    """By name; the first is what the others are matched with.  null takes one of a base file away."""
    probes: ProbesConfig | None = None
    """Trained on by every arm too, at each of its rates with the first seed."""
    plasticity_words: CountOrZero = 0
    """Made-up words by which each trained model's plasticity is judged, see `lfm plasticity`; 0: it is not."""
    keep_checkpoints: bool = False
    """false: those of a run are removed once it is finished and measured."""

    @field_validator("arms", mode="before")
    @classmethod
    def _without_null(cls, arms: Any) -> Any:
        return {name: arm for name, arm in arms.items() if arm is not None} if isinstance(arms, dict) else arms

    @model_validator(mode="after")
    def _check(self) -> Self:
        for where, tree in {
            "common": self.common,
            **{f"arms.{n}.set": arm.set for n, arm in self.arms.items()},
        }.items():
            for key in flat(tree):
                if key in _OF_THE_SET:
                    raise ValueError(f"{where}.{key} is not for a set: {_OF_THE_SET[key]}; leave it out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice; give each another")
        if 0 < self.plasticity_words < 8:
            raise ValueError(f"plasticity_words={self.plasticity_words}: there are 8 meanings; give 8 or more, or 0")
        counts = {}
        for name, arm in self.arms.items():
            if arm.untrained:
                continue
            rates = self.rates_of(name)
            if not rates:
                raise ValueError(f"arm {name} has no learning rates; give `rates` of the set or of the arm")
            if len({f"{rate:g}" for rate in rates}) < len(rates):
                raise ValueError(f"rates of arm {name} name one twice: {', '.join(f'{r:g}' for r in rates)}")
            counts[name] = len(rates)
        if len(set(counts.values())) > 1:
            few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise ValueError(
                f"arm {few} has {counts[few]} learning rates and arm {many} {counts[many]}; give each arm as many, so "
                "that none is tuned more carefully"
            )
        if all(arm.untrained for arm in self.arms.values()):
            raise ValueError("every arm is untrained; give one that is trained")
        return self

    @property
    def folder(self) -> Path:
        return expanded(self.output) / self.name

    @property
    def tasks(self) -> tuple[str, ...]:
        return (TEXT, *(self.probes.tasks if self.probes is not None else ()))

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """Those of its sweep, in rising order."""
        own = self.arms[arm]
        return (UNTRAINED_RATE,) if own.untrained else tuple(sorted(own.rates or self.rates))


@dataclass(frozen=True)
class Planned:
    """One run of a set."""

    task: str
    arm: str
    rate: float
    seed: int
    run: RunConfig
    untrained: bool = False

    @property
    def label(self) -> str:
        rate = "untrained" if self.untrained else f"lr {self.rate:g}"
        return f"{self.arm}, {rate}, seed {self.seed}" + (f", {self.task}" if self.task != TEXT else "")

    @property
    def folder(self) -> Path:
        return self.run.folder


_DEFAULTS = (
    # What the shipped presets have for somebody who watches one run.
    *("samples.prompts=[]", "samples.every_steps=0", "evaluation.tasks=[]", "logging.tensorboard=false"),
    *("validation.patience=0", "checkpoint.keep_best=false", "checkpoint.keep=1"),
)


def planned_run(
    ablation: AblationConfig, task: str, arm: str, rate: float, seed: int, *, steps: int | None = None
) -> Planned:
    """The run of an arm on a task; `steps` in place of those that the set's tokens are.  Raises UserError."""
    own = ablation.arms[arm]
    name = "untrained" if own.untrained else f"lr_{rate:g}".replace("+", "")
    # What is measured after the training is measured on the last checkpoint.
    is_measured = task in PROBES or (task == TEXT and ablation.plasticity_words > 0)
    fixed: dict[str, Any] = {
        "output": str(ablation.folder / task / arm),
        "name": f"{name}_seed_{seed}",
        "seed": seed,
        "optimizer.lr": rate,
        "checkpoint.resume": "auto",
        "checkpoint.save_at_end": is_measured or ablation.keep_checkpoints,
    }
    if task in PROBES:
        assert ablation.probes is not None
        fixed |= {
            "data.path": str(probe_folder(ablation, task)),
            "data.windows": "sequential",
            "model.seq_length": SEQ_LENGTH,
            "model.vocab_size": VOCAB_SIZE,
            "training.global_batch_size": ablation.probes.global_batch_size,
        }
        steps = ablation.probes.steps
    if task == PILOT:
        steps = PILOT_STEPS
        fixed |= {"logging.every_steps": 10, "checkpoint.every_steps": 0}
    if own.untrained:
        steps = 1
    overrides = [*_DEFAULTS, *_overrides(ablation.common), *_overrides(own.set)]
    try:
        if steps is None or task in PROBES:
            given = RunConfig.load(own.config, [*overrides, "training.steps=1"])
            rows, micro = given.training.global_batch_size, given.training.micro_batch_size
            steps = steps or math.ceil(ablation.tokens / (rows * given.model.seq_length))
            if task in PROBES:  # whose batch the micro-batch of the set's own rows need not divide
                fixed["training.micro_batch_size"] = math.gcd(fixed["training.global_batch_size"], micro)
        run = RunConfig.load(own.config, [*overrides, *_assigned(fixed), f"training.steps={steps}"])
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None
    if run.validation.patience:
        raise UserError(f"arm {arm}: validation.patience={run.validation.patience} would end runs early; set it to 0")
    if run.parallel.zero_stage:
        raise UserError(
            f"arm {arm}: parallel.zero_stage={run.parallel.zero_stage}, and a run of a set has one process; set it to 0"
        )
    return Planned(task, arm, rate, seed, run, own.untrained)


def probe_folder(ablation: AblationConfig, task: str) -> Path:
    """Of the data set of a probe."""
    return ablation.folder / "data" / task


def first_runs(ablation: AblationConfig, task: str = TEXT) -> dict[str, Planned]:
    """One run of each arm, by arm: what arms are compared by before anything runs.  Raises UserError."""
    return {
        arm: planned_run(ablation, task, arm, ablation.rates_of(arm)[0], ablation.seeds[0]) for arm in ablation.arms
    }


_OF_THE_SET = {
    "training.steps": "tokens (or match.seconds) decides",
    "optimizer.lr": "rates are learning rates",
    "seed": "seeds are those of all arms",
    "name": "a run is called by its arm, rate and seed",
    "output": "the set has one",
}
"""Keys of a run that a set gives each of its runs, and why."""

_SHARED = (
    "training.device",
    "model.seq_length",
    "model.vocab_size",
    "training.global_batch_size",
    "data",
    "validation",
    "schedule",
)
"""What decides which rows an arm reads and is judged by, and how its rate goes over the run."""


def check_shared(runs: dict[str, Planned]) -> None:
    """Raises UserError for an arm that reads other rows than the first, is judged by others or has another schedule."""
    (first, reference), *others = runs.items()
    wanted = flat(reference.run.model_dump(mode="json"))
    for arm, planned in others:
        found = flat(planned.run.model_dump(mode="json"))
        for key in sorted({*wanted, *found}):
            if any(key == part or key.startswith(f"{part}.") for part in _SHARED) and found.get(key) != wanted.get(key):
                raise UserError(
                    f"arm {arm} has {key}={_plain(found.get(key))} and arm {first} {_plain(wanted.get(key))}, but arms "
                    f"share what they read, are judged by and are scheduled by; set {key} under `common` and leave it "
                    f"out of arms.{arm}.set"
                )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _overrides(tree: dict[str, Any]) -> Iterator[str]:
    return _assigned({key: value for key, value in flat(tree).items() if value != {}})


def _assigned(leaves: dict[str, Any]) -> Iterator[str]:
    """JSON is YAML."""
    return (f"{key}={_plain(value)}" for key, value in leaves.items())


def _plain(value: Any) -> str:
    return json.dumps(value)
