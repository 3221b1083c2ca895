"""Runs a set: each run in a process of its own, one a GPU or one on the CPU; what is finished is never run again."""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lfm.errors import UserError
from lfm.experiments.ablation import (
    PILOT,
    TEXT,
    AblationConfig,
    Planned,
    check_shared,
    first_runs,
    flat,
    planned_run,
    probe_folder,
)
from lfm.experiments.matching import Size, check_matched, sizes_of
from lfm.experiments.probes import PROBES, write_data
from lfm.experiments.results import (
    AGAIN,
    FINISHED,
    Result,
    best_rate,
    check_same_rows,
    read_result,
    report,
    write_files,
)
from lfm.experiments.work import in_own_process
from lfm.files import exists, held_alone, listed, read_file, ready_folder, remove_temporaries, shown, write_durably
from lfm.talk import say, talking
from lfm.training.run import RunConfig
from lfm.training.start import wishes_to_stop
from lfm.training.state import open_data

SET_NAME = "ablation.yaml"
"""In the set's folder: the resolved set that its runs are of."""
_SECONDS_BETWEEN_PICTURES = 20.0
_SECONDS_FOR_A_SAVE = 180.0
"""How long the processes of a harness that was killed may hold their runs."""
_SLOW_IMPORTS = ["lfm.experiments.work", "lfm.training.plots", "torch._dynamo"]
"""None of them looks for a GPU, which a process must not have done that others are forked from."""
_LAST_LINES = 8
_FEWEST_STEPS = 10
"""Of a run with match.by=seconds."""
_OF_EVERY_RUN = {"common", "tokens", "match", "plasticity_words", "keep_checkpoints"}
"""Keys of a set by which runs of before a change are not those of after."""


@dataclass
class Harness:
    """A set between two runs."""

    ablation: AblationConfig
    sizes: dict[str, Size]
    arms: Sequence[str]
    """That are run now."""
    tasks: Sequence[str]
    results: dict[Path, Result] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    """Runs that ended in this session without a finding -> what they said last."""
    _plans: dict[tuple[Any, ...], Planned] = field(default_factory=dict)
    _unchanged: set[Path] = field(default_factory=set)
    _drawn: float = field(default_factory=time.monotonic)

    def planned(self) -> list[Planned]:
        """Every run that is known to be wanted, in order; finished ones too.

        Further seeds of an arm are known once its sweep is whole; and with match.by=seconds, everything once it has its
        pilot.
        """
        a = self.ablation
        pilots, sweeps, further, probes = [], [], [], []
        for arm in a.arms:
            steps, rates = None, a.rates_of(arm)
            if a.match.by == "seconds" and not a.arms[arm].untrained:
                pilot = self._plan(PILOT, arm, rates[0], a.seeds[0])
                pilots.append(pilot)
                steps = self._steps_by(pilot)
                if steps is None:
                    continue
            sweep = [self._plan(TEXT, arm, rate, a.seeds[0], steps) for rate in rates]
            sweeps += sweep
            found = [self.results[planned.folder] for planned in sweep if planned.folder in self.results]
            best = best_rate(found) if len(found) == len(sweep) else None
            if best is not None:
                further += [self._plan(TEXT, arm, best, seed, steps) for seed in a.seeds[1:]]
            probes += [self._plan(task, arm, rate, a.seeds[0]) for task in a.tasks[1:] for rate in rates]
        return [*pilots, *sweeps, *further, *probes]

    def _plan(self, task: str, arm: str, rate: float, seed: int, steps: int | None = None) -> Planned:
        key = (task, arm, rate, seed, steps)
        if key not in self._plans:
            self._plans[key] = planned_run(self.ablation, task, arm, rate, seed, steps=steps)
        return self._plans[key]

    def _steps_by(self, pilot: Planned) -> int | None:
        """That take match.seconds at the speed of a finished pilot.  Raises UserError for one that told none."""
        result = self.results.get(pilot.folder)
        if result is None:
            return None
        if result.tokens_per_second is None:
            raise UserError(
                f"the pilot of arm {pilot.arm} diverged at its lowest learning rate, {pilot.rate:g}, so that its speed "
                f"is not known; give the arm lower rates, and remove {shown(pilot.folder)}"
            )
        assert self.ablation.match.seconds is not None
        tokens = pilot.run.training.global_batch_size * pilot.run.model.seq_length
        return max(_FEWEST_STEPS, round(self.ablation.match.seconds * result.tokens_per_second / tokens))

    def is_asked(self, planned: Planned) -> bool:
        """Whether this session is to run it."""
        return planned.arm in self.arms and (planned.task in self.tasks or planned.task == PILOT)

    def look(self) -> list[Planned]:
        """Read what has become finished, until nothing new is known of what is wanted.  Raises UserError for files of
        another set."""
        while True:
            planned = self.planned()
            for each in planned:
                self._check_unchanged(each)
            new = [each for each in planned if each.folder not in self.results and each.folder not in self.failed]
            found = {each.folder: result for each in new if (result := read_result(each)) is not None}
            if not found:
                return planned
            self.results |= found
            check_same_rows(list(self.results.values()))

    def _check_unchanged(self, planned: Planned) -> None:
        """Raises UserError for a run that was begun with another configuration."""
        file = planned.folder / "config.yaml"
        if planned.folder in self._unchanged:
            return
        if not exists(file):
            if exists(planned.folder / FINISHED):
                raise UserError(f"{shown(file)} is missing; {AGAIN}")
            return
        wanted = flat(planned.run.model_dump(mode="json"))
        # A set may move to another place, and its own data with it.
        moved = [f"output={json.dumps(planned.run.output)}"]
        if planned.task in PROBES:
            moved.append(f"data.path={json.dumps(planned.run.data.path)}")
        try:
            found = flat(RunConfig.load(file, moved).model_dump(mode="json"))
        except UserError:
            raise UserError(f"{shown(file)} is damaged, or of another version; {AGAIN}") from None
        for key in sorted({*wanted, *found}):
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{shown(planned.folder)} was begun with {key}={json.dumps(found.get(key))}, and the set has "
                    f"{json.dumps(wanted.get(key))} now; put it back, give the set another name=NAME, or remove that "
                    "folder"
                )
        self._unchanged.add(planned.folder)

    def write(self, planned: Sequence[Planned], *, last: bool = False) -> None:
        """RESULT.json, RESULT.md, and now and then RESULT.png."""
        known = {each.folder for each in planned}
        results = [result for folder, result in self.results.items() if folder in known]
        # In the order of the set, whatever came first.
        order = {each.folder: i for i, each in enumerate(planned)}
        results.sort(key=lambda result: order[result.planned.folder])
        result = report(self.ablation, self.sizes, planned, results)
        folder = self.ablation.folder
        for name, content in write_files(result).items():
            if not exists(folder / name) or read_file(folder / name) != content:
                write_durably(folder / name, content)
        image, data = folder / "RESULT.png", folder / "RESULT.json"
        is_old = not exists(image) or image.stat().st_mtime_ns < data.stat().st_mtime_ns
        if is_old and (last or time.monotonic() > self._drawn + _SECONDS_BETWEEN_PICTURES):
            from lfm.experiments.figures import picture

            drawn = picture(result)
            if drawn is not None:
                write_durably(image, drawn)
            self._drawn = time.monotonic()

    def expected_seconds(self, planned: Planned) -> float | None:
        """Of a run, by the longest one of its arm and task, else of its task; None: nothing is known."""
        alike = [r for r in self.results.values() if r.planned.task == planned.task and not r.planned.untrained]
        own = [result for result in alike if result.planned.arm == planned.arm]
        return max((result.finished["wall_seconds"] for result in own or alike), default=None)

    def longest_seconds(self, arm: str) -> float:
        """Of the arm's finished runs; infinite while there is none."""
        own = [r.finished["wall_seconds"] for r in self.results.values() if r.planned.arm == arm]
        return max(own, default=math.inf)

    def count_left(self, planned: Sequence[Planned]) -> int:
        """Runs that are asked for and not finished, those that are not known yet too."""
        a, asked = self.ablation, [each for each in planned if self.is_asked(each)]
        left = sum(each.folder not in self.results for each in asked)
        if TEXT in self.tasks:
            for arm in self.arms:
                seeds = {(each.rate, each.seed) for each in asked if each.arm == arm and each.task == TEXT}
                swept = [r for r in self.results.values() if r.planned.arm == arm and r.planned.task == TEXT]
                all_diverged = len(swept) == len(a.rates_of(arm)) and best_rate(swept) is None
                if not all_diverged:
                    left += max(0, len(a.rates_of(arm)) + len(a.seeds) - 1 - len(seeds))
        return left


def prepared(ablation: AblationConfig, *, only: Sequence[str] = (), tasks: Sequence[str] = ()) -> Harness:
    """The set with everything checked that can be before its folder is touched.  Raises UserError."""
    runs = first_runs(ablation)
    check_shared(runs)
    sizes = sizes_of(runs)
    check_matched(ablation, sizes)
    for given, known, what in ((only, tuple(ablation.arms), "--only"), (tasks, ablation.tasks, "--tasks")):
        for name in given:
            if name not in known:
                raise UserError(
                    f"{what} names {name!r}, which the set {ablation.name} has not; there are {', '.join(known)}"
                )
    return Harness(ablation, sizes, only or tuple(ablation.arms), tasks or ablation.tasks)


def visible_gpus(wanted: str | None, device: torch.device) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each run at once; [None]: one at a time, on the device that there is.

    `wanted`: numbers such as 0,1, one twice for two runs at once there; None: all.  Raises UserError for more than
    there are.
    """
    if device.type != "cuda":
        if wanted is not None:
            raise UserError(
                f"--gpus {wanted} is for GPUs, and runs of this set train on the {device.type}; leave it out"
            )
        return [None]
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (given.split(",") if given else [str(number) for number in range(count)])[:count]
    if wanted is None:
        return [*names]
    numbers = wanted.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--gpus {wanted} is no list of numbers; write it as 0,1,2")
    for number in numbers:
        if int(number) >= count:
            raise UserError(f"--gpus {wanted} asks for GPU {number}, and {count} are visible, from 0 on; name fewer")
    return [names[int(number)] for number in numbers]


def run_set(harness: Harness, gpus: Sequence[str | None], *, minutes: float | None = None) -> bool:
    """Run what is asked for and not finished; whether no run failed.

    `minutes`: begin none that would not fit, and stop those that are still running then, saved.
    Raises UserError for data that do not fit, and for a folder of another set or of another process.
    """
    ablation, begun = harness.ablation, time.monotonic()
    if ablation.match.by == "seconds" and len(set(gpus)) < len(gpus):
        raise UserError("match.by=seconds gives each run a GPU of its own; name every one once in --gpus")
    folder = ablation.folder
    ready_folder(folder)
    deadline = None if minutes is None else begun + 60 * minutes
    with (
        talking(),
        held_alone(
            folder / ".lock",
            unwritable=f"{shown(folder)} cannot be written; set output=DIR",
            taken=f"another process runs the set in {shown(folder)}; wait for it, or give name=NAME",
        ),
        wishes_to_stop(deadline) as why_stop,
    ):
        remove_temporaries(folder)
        _check_folder(ablation)
        _ready(harness)
        processes = _Processes(harness, list(gpus))
        try:
            cause = _run_all(harness, processes, why_stop, deadline)
        finally:
            processes.end()
            harness.write(harness.look(), last=True)
    left = harness.count_left(harness.planned())
    if left:
        say(f"{_runs(left)} left{f', by {cause}' if cause else ''}; the same command goes on")
    drawn = ", RESULT.json and RESULT.png" if exists(folder / "RESULT.png") else " and RESULT.json"
    say(f"{folder / 'RESULT.md'}{drawn} hold what there is")
    return not harness.failed


def _check_folder(ablation: AblationConfig) -> None:
    """Raises UserError for a folder of another set, or of something else."""
    folder, file = ablation.folder, ablation.folder / SET_NAME
    if exists(file):
        try:
            kept = AblationConfig.load(file)
        except UserError:
            raise UserError(
                f"{shown(file)} is damaged, or of another version; put it back, or give this set another name=NAME or "
                "output=DIR"
            ) from None
        wanted, found = (flat(each.model_dump(mode="json", include=_OF_EVERY_RUN)) for each in (ablation, kept))
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise UserError(
                    f"{shown(folder)} holds another set: there {key}={json.dumps(found.get(key))}, here "
                    f"{json.dumps(wanted.get(key))}; give this one another name=NAME or output=DIR"
                )
    elif [path for path in listed(folder) if path.name != ".lock"]:
        raise UserError(f"{shown(folder)} is not empty and holds no set; give another name=NAME or output=DIR")


def _ready(harness: Harness) -> None:
    """Open or make what the runs that are left read, and keep the set in its folder.  Raises UserError for data that do
    not fit."""
    a, left = harness.ablation, [each for each in harness.look() if harness.is_asked(each)]
    left = [each for each in left if each.folder not in harness.results]
    of_text = [each for each in left if each.task in (TEXT, PILOT)]
    if of_text:
        open_data(of_text[0].run)
    # Not before: a set whose data are mistyped has no claim to the folder.
    file, content = a.folder / SET_NAME, a.to_yaml().encode()
    if not exists(file) or read_file(file) != content:
        write_durably(file, content)
    for task in sorted({each.task for each in left if each.task in PROBES}):
        assert a.probes is not None
        rows = a.probes.steps * a.probes.global_batch_size
        write_data(task, probe_folder(a, task), train_rows=rows, seed=a.seeds[0])


def _run_all(
    harness: Harness, processes: "_Processes", why_stop: Callable[[], str | None], deadline: float | None
) -> str | None:
    """Until everything is finished or failed, or something asks to stop: what that was."""
    planned = harness.look()
    harness.write(planned)
    while True:
        if (cause := why_stop()) is not None:
            return cause
        waiting = [each for each in planned if harness.is_asked(each) and _is_open(harness, processes, each)]
        fitting = [each for each in waiting if _fits(harness, each, deadline)]
        if fitting and processes.free:
            # Slow arms first, so that none of their runs is left alone at the end.
            processes.start(max(fitting, key=lambda each: harness.longest_seconds(each.arm)))
            continue
        if not processes.running:
            return "the end of its time" if waiting else None
        for ended in processes.ended(0.5):
            planned = harness.look()
            _tell(harness, ended, planned, len(processes.slots))
            harness.write(planned)


def _is_open(harness: Harness, processes: "_Processes", planned: Planned) -> bool:
    known = (harness.results, harness.failed, processes.running)
    return all(planned.folder not in each for each in known)


def _fits(harness: Harness, planned: Planned, deadline: float | None) -> bool:
    expected = harness.expected_seconds(planned)
    return deadline is None or expected is None or time.monotonic() + expected <= deadline


def _tell(harness: Harness, ended: Planned, planned: Sequence[Planned], at_once: int) -> None:
    """One line of a run that has ended."""
    left = harness.count_left(planned) - sum(
        harness.is_asked(each) and each.folder in harness.failed for each in planned
    )
    known = [result.finished["wall_seconds"] for result in harness.results.values()]
    eta = f"; {left} left, about {left * statistics.fmean(known) / at_once / 60:.1f} min" if known and left > 0 else ""
    result = harness.results.get(ended.folder)
    if result is None:
        say(f"failed: {ended.label}{eta}: {harness.failed.get(ended.folder, 'no finding')}")
        return
    said = "diverged" if result.diverged else f"held out {result.loss:.4f}"
    if "accuracy" in result.finished:
        said += f", right {result.finished['accuracy']:.1%}, longer {result.finished['accuracy_longer']:.1%}"
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    say(f"{ended.label}: {said}{speed}, {result.finished['wall_seconds']:.0f} s{eta}")


@dataclass
class _Running:
    planned: Planned
    process: BaseProcess
    slot: str | None
    log: Path


class _Processes:
    """The runs under way.

    Processes are forked from a server that has paid the slow imports and nothing else: forks of this one could inherit
    CUDA, or locks of its threads.
    """

    def __init__(self, harness: Harness, slots: list[str | None]) -> None:
        self.harness, self.slots, self.free = harness, slots, list(slots)
        self.running: dict[Path, _Running] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_SLOW_IMPORTS)

    def start(self, planned: Planned) -> None:
        """Begin or go on with a run, in the first free slot."""
        _wait_until_free(planned)
        config, log = (planned.folder.with_name(f"{planned.folder.name}{end}") for end in (".yaml", ".log"))
        if not exists(config) or read_file(config) != planned.run.to_yaml().encode():
            write_durably(config, planned.run.to_yaml().encode())
        measures: dict[str, Any] = {
            "is_probe": planned.task in PROBES,
            "plasticity_words": self.harness.ablation.plasticity_words if planned.task == TEXT else 0,
            "keep_checkpoints": self.harness.ablation.keep_checkpoints,
        }
        slot = self.free.pop(0)
        measures["shares_gpu"] = self.slots.count(slot) > 1
        process = self._context.Process(target=in_own_process, args=(str(config), str(log), slot, measures))
        process.start()
        self.running[planned.folder] = _Running(planned, process, slot, log)

    def ended(self, seconds: float) -> list[Planned]:
        """Runs that have ended, after waiting for one so long; what failed is noted."""
        by_sentinel = {running.process.sentinel: running for running in self.running.values()}
        found = [by_sentinel[sentinel] for sentinel in wait(list(by_sentinel), seconds)]  # pyright: ignore
        for running in found:
            running.process.join()
            del self.running[running.planned.folder]
            self.free.append(running.slot)
            if (cause := _cause(running)) is not None:
                self.harness.failed[running.planned.folder] = cause
        return [running.planned for running in found]

    def end(self) -> None:
        """Ask all that still run to save and end, and wait for them."""
        for running in self.running.values():
            running.process.terminate()
        for running in self.running.values():
            running.process.join()
        self.running.clear()


def _cause(running: _Running) -> str | None:
    """Why a run that has ended is not finished; None: it is."""
    try:
        if read_result(running.planned) is not None:
            return None
    except UserError as error:  # others go on
        return str(error)
    code = running.process.exitcode or 0
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}" if code else "stopped"
    return f"{how}; {shown(running.log)} ends:{_last_lines(running.log)}"


def _wait_until_free(planned: Planned) -> None:
    """Processes of a harness that was killed save, and then let go of their runs."""
    until, said = time.monotonic() + _SECONDS_FOR_A_SAVE, False
    while True:
        try:
            with held_alone(
                planned.folder / ".lock",
                unwritable=f"{shown(planned.folder)} cannot be written",
                taken=f"another process trains in {shown(planned.folder)}; wait for it, or end it",
            ):
                return
        except UserError:
            if time.monotonic() > until:
                raise
        if not said:
            say(f"waiting for the process that trains in {shown(planned.folder)}")
            said = True
        time.sleep(0.2)


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count:,} runs are"


def _last_lines(log: Path) -> str:
    lines = read_file(log).decode(errors="replace").strip().splitlines() if exists(log) else []
    return "".join(f"\n    {line}" for line in lines[-_LAST_LINES:])
