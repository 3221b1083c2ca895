"""Steps of a whole model under a layout: timed without a profiler, then profiled; real routing and forced balance."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.model.parts import DATA_WAIT, STEP, marked
from benchmarks.model.routing import forced_balance
from benchmarks.model.waterfall import Waterfall, mean, recorded, scaled, shares, waterfalls
from lfm.data.batch import Batch
from lfm.data.stream import BatchStream, open_split
from lfm.errors import UserError
from lfm.job.fork import run_ranks
from lfm.job.process import Process, prepare_environment
from lfm.layout.layout import Layout
from lfm.training.metrics import peak_flops
from lfm.training.run import RunConfig
from lfm.training.start import local_engine

Routing = Literal["real", "balanced"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
_LR = 1e-5


@dataclass(frozen=True)
class Plan:
    """What is done with each routing, in one process after the other routing."""

    warmup: int = 2
    """Steps before the timed ones; the very first compiles."""
    steps: int = 5
    profiled: int = 2
    """Steps under the profiler, after the timed ones."""
    routings: tuple[Routing, ...] = ("real",)
    random_ids: bool = False
    """In place of the run's data, rows of random ids, each one document."""


def routings(run: RunConfig, choice: str) -> tuple[Routing, ...]:
    """Of `real`, `balanced` or `both`; models without experts route nothing.  Raises UserError."""
    has_experts = any(measure.name == "expert_load" for measure in run.model.measured)
    if choice == "balanced" and not has_experts:
        raise UserError(f"--routing balanced: model.kind={run.model.kind} has no experts here; give --routing real")
    return tuple(name for name in ROUTINGS if choice == name or (choice == "both" and (has_experts or name == "real")))


class RandomRows:
    """A stream of random ids."""

    def __init__(self, run: RunConfig, take: slice) -> None:
        self.run, self.take, self.step = run, take, 0

    def next(self) -> Batch:
        T, rows = self.run.model.seq_length, self.run.training.global_batch_size
        generator = torch.Generator().manual_seed(self.run.seed + self.step)
        self.step += 1
        ids = torch.randint(0, self.run.model.vocab_size, (rows, T), generator=generator)
        return Batch(ids, [[T]] * rows)[self.take]

    def close(self) -> None:
        """There is nothing to close."""


def check_data(run: RunConfig) -> None:
    """Raises UserError where the run has no rows to train on."""
    try:
        open_split(run.data, "train", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    except UserError as error:
        raise UserError(f"{error}; or give --random-ids") from None


def rows_of(run: RunConfig, take: slice, *, random_ids: bool) -> Any:
    """A stream whose `next` gives the rows that `take` has of each step."""
    if random_ids:
        return RandomRows(run, take)
    rows = open_split(run.data, "train", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    return BatchStream(rows, seed=run.seed, rows_per_step=run.training.global_batch_size, take=take, prefetch_threads=2)


def measure(
    process: Process,
    run: RunConfig,
    layout: Layout | None,
    device_type: str,
    plan: Plan,
    gather: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """One process's figures, by routing; `gather` gets them too, while the processes are still connected."""
    began = time.monotonic()
    if layout is not None:
        prepare_environment(device_type, tensor=layout.tensor)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    device = torch.device(device_type, process.local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _engine(process, run, layout, device) as engine:
        stream = rows_of(run, engine.rows_of_step(run.training.global_batch_size), random_ids=plan.random_ids)
        steps = _Steps(engine, stream)
        steps.one()
        first_step = time.monotonic() - began
        measured: dict[str, Any] = {}
        for routing in plan.routings:
            with forced_balance() if routing == "balanced" else nullcontext():
                measured[routing] = _measured(steps, plan, layout)
        stream.close()
        found = {
            "routings": measured,
            "seconds_to_first_step": first_step,
            "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        }
        gather(found)
    return found


@contextmanager
def _engine(process: Process, run: RunConfig, layout: Layout | None, device: torch.device) -> Iterator[Any]:
    if layout is None:
        yield local_engine(run, device)
        return
    from lfm.parallel import groups
    from lfm.training.parallel_engine import ParallelEngine

    groups.join(process, device, timeout_seconds=300)
    yield ParallelEngine(
        run.model,
        run.optimizer,
        groups.make_groups(layout, device),
        seed=run.seed,
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
        objective=run.objective,
    )
    dist.barrier()
    groups.leave()


class _Steps:
    """Training steps of one engine, and what they took."""

    def __init__(self, engine: Any, stream: Any) -> None:
        self.engine, self.stream = engine, stream
        self.count = 0
        self.clear()

    def clear(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.imbalance: list[float] = []
        self.pairs: list[int] = []

    def one(self) -> None:
        start = self.engine.synchronize()
        with record_function(STEP):
            with record_function(DATA_WAIT):
                batch = self.stream.next()
            self.engine.start_step(self.count, 1 << 20)
            result = self.engine.forward_backward(batch)
            with record_function("lfm: optimizer"):
                self.engine.step(_LR)
            end = self.engine.synchronize()
        self.count += 1
        self.seconds.append(end - start)
        self.losses.append(result.terms[self.engine.objective.terms[0].name])
        self.pairs.append(result.attended_pairs)
        loads = result.measured.get("expert_load", {}).values()
        if loads:
            self.imbalance.append(statistics.mean(max(load) * len(load) / sum(load) for load in loads))


def _measured(steps: _Steps, plan: Plan, layout: Layout | None) -> dict[str, Any]:
    device = steps.engine.device
    steps.clear()
    for _ in range(plan.warmup):
        steps.one()
    warm = steps.losses
    steps.clear()
    waiting: list[float] = []
    for _ in range(plan.steps):
        with _in_stage(steps.engine) if layout is not None and layout.pipeline > 1 else nullcontext() as waited:
            steps.one()
        if waited is not None:
            waiting.append(waited())
    timed = {
        "seconds": steps.seconds,
        "losses": [*warm, *steps.losses],
        "expert_load_max_over_mean": steps.imbalance,
        "attended_pairs": statistics.mean(steps.pairs),
        "waiting": statistics.median(waiting) if waiting else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    steps.clear()
    return timed | {"waterfall": _profiled(steps, plan.profiled, parallel=layout is not None)}


def _profiled(steps: _Steps, count: int, *, parallel: bool) -> Waterfall:
    device = steps.engine.device
    models = [steps.engine.model] if hasattr(steps.engine, "model") else list(steps.engine.pieces)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with marked(models, parallel=parallel), profile(activities=activities) as profiler:
        for _ in range(count):
            steps.one()
    return mean(waterfalls(recorded(profiler)))


@contextmanager
def _in_stage(engine: Any) -> Iterator[Callable[[], float]]:
    """Yields a function: the share of a pipeline's time outside this stage's own forward and backward passes.

    What a schedule does outside them is waiting for another stage: the bubble, imbalance and transfers.
    """
    from megatron.core.pipeline_parallel import schedules

    passes: list[tuple[Any, Any]] = []
    whole: list[tuple[Any, Any]] = []

    def mark() -> Any:
        if engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if engine.device.type == "cuda" else b - a

    with ExitStack() as stack:
        for owner, name, spans in (
            (schedules, "forward_step", passes),
            (schedules, "backward_step", passes),
            (engine, "forward_backward", whole),
        ):
            stack.enter_context(_timed(owner, name, spans, mark))
        yield lambda: 1 - sum(between(*span) for span in passes) / sum(between(*span) for span in whole)


@contextmanager
def _timed(owner: Any, name: str, spans: list[tuple[Any, Any]], mark: Callable[[], Any]) -> Iterator[None]:
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = mark()
        result = function(*args, **kwargs)
        spans.append((start, mark()))
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


def summary(run: RunConfig, name: str, layout: Layout | None, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of a layout: of its first routing, and of the others under their names."""
    first, *others = ranks[0]["routings"]
    found = {
        "name": name,
        "layout": layout.name if layout else "one GPU, local engine",
        "describe": layout.describe() if layout else "",
        "gpus": len(ranks),
        "tokens_per_step": run.training.global_batch_size * run.model.seq_length,
        "micro_batch_size": run.training.micro_batch_size,
        "parameters": run.model.count_parameters().total,
        "seconds_to_first_step": max(rank["seconds_to_first_step"] for rank in ranks),
        "cuda_device_max_connections": ranks[0]["connections"],
        "routing": first,
        **_routing_summary(run, [rank["routings"][first] for rank in ranks]),
    }
    if layout is not None and layout.pipeline > 1:
        work = layout.num_micro_batches * layout.virtual_pipeline
        found["bubble_predicted"] = (layout.pipeline - 1) / (layout.pipeline - 1 + work)
        # A stage with less work waits too: this is the bubble if all stages worked as long as the slowest.
        found["waiting_predicted"] = 1 - (1 - found["bubble_predicted"]) * layout.balance
    for routing in others:
        found[routing] = _routing_summary(run, [rank["routings"][routing] for rank in ranks])
    return found


def _routing_summary(run: RunConfig, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, world = run.training.global_batch_size * run.model.seq_length, len(ranks)
    seconds, attended = ranks[0]["seconds"], ranks[0]["attended_pairs"] / tokens
    step = statistics.median(seconds)
    rate = tokens / step / world
    peak = peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    falls = [scaled(rank["waterfall"], 1e3 * step) for rank in ranks]
    found = {
        "tokens_per_second_per_gpu": rate,
        "range": [tokens / each / world for each in (max(seconds), min(seconds))],
        "step_ms": 1e3 * step,
        "mfu_attended": rate * run.model.flops_per_token(attended=attended) / peak if peak else None,
        "mfu_if_rows_were_one_document": rate * run.model.flops_per_token() / peak if peak else None,
        "peak_memory_gib": [rank["peak_memory_gib"] for rank in ranks],
        "losses": ranks[0]["losses"],
        # Mean over layers, by step.
        "expert_load_max_over_mean": ranks[0]["expert_load_max_over_mean"],
        "steps_measured": len(seconds),
        "waterfall": asdict(mean(falls)),
        "waterfall_by_rank": [asdict(fall) for fall in falls],
        "profile": [shares(fall) for fall in falls],
    }
    if ranks[0]["waiting"] is not None:
        found["waiting"] = [rank["waiting"] for rank in ranks]
    return found


def measured_here(
    run: RunConfig, layout: Layout | None, name: str, device_type: str, plan: Plan, timeout_seconds: float
) -> dict[str, Any]:
    """The summary of a layout, on new processes of this machine.  Raises RuntimeError where one fails."""
    world = layout.world if layout is not None else 1
    ranks = run_ranks(measure, world, run, layout, device_type, plan, timeout_seconds=timeout_seconds)
    return summary(run, name, layout, ranks)
