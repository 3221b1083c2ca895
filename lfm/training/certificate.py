"""The certificate: what a layout computes, number by number, next to what one process computes.

One optimizer step at equal weights and data under a layout and under the local engine: loss, auxiliary losses, gradient
norm, the gradient of every parameter as the update takes it (after clipping), held-out loss, and what guards moved by
the step.  Then further steps, whose drift is reported and not bounded, because rounding alone grows.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lfm.data.batch import Batch
from lfm.files import write_durably
from lfm.job.fork import run_ranks
from lfm.job.process import Process, prepare_environment
from lfm.layers.router import MEAN_GRID
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout
from lfm.models.language_model import Recompute
from lfm.models.losses import Objective
from lfm.models.registry import ModelConfig
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.parallel import groups as process_groups
from lfm.parallel.zero import inner_optimizer
from lfm.training.engine import Engine
from lfm.training.local_engine import LocalEngine
from lfm.training.optimizer.kind import OptimizerKind
from lfm.training.parallel_engine import ParallelEngine

BOUNDS = {
    "loss": 1e-5,
    "auxiliary": 1e-5,
    "norm": 1e-5,
    "clip": 1e-5,
    "gradient": 1e-4,
    "held_out": 1e-5,
    "balance": MEAN_GRID,
}
"""Largest relative deviations in fp32; a gradient's is the norm of the difference over the norm of the tensor.

That of the routers' balance is absolute: a mean logit near the middle of two numbers of its grid may be rounded to
either.  What else moves is made of counts, and must be equal.
"""
BF16_BOUNDS = BOUNDS | {"loss": 1e-6, "auxiliary": 1e-6, "norm": 2e-4, "clip": 2e-4, "gradient": 1e-2, "held_out": 1e-6}
"""In bf16, where no matrix is cut: only sums of gradients are rounded elsewhere.

One process differs from itself, when its micro-batches are of 2 to 8 rows instead of 1, by up to 8e-8 in loss, 6e-8 in
auxiliary losses, 7e-5 in norm and clip factor, 3.7e-3 in the gradient of a tensor (a rounding is 2^-9), on CPUs, of
`lfm_debug` and of a model a quarter as wide: the bounds are 3 to 17 times that.
"""
BF16_CUT_BOUNDS = {
    "loss": 5e-4,
    "auxiliary": 5e-4,
    "norm": 1e-3,
    "clip": 1e-3,
    "gradient": 3e-1,
    "held_out": 3e-4,
    "balance": 2 * MEAN_GRID,
}
"""In bf16, where tensor-parallel processes cut matrices: activations too are rounded elsewhere, so that they are about
as far from those of one process as its own are from fp32.

That distance is, of the same two models, up to 1.4e-4 in loss, norm and clip factor, 1.1e-4 in auxiliary losses, 6e-5
in held-out loss, a step of the grid in means of the balance and 1.9e-1 in the gradient of a tensor, a router's; the
bounds are 1.5 (gradient) to 7 times that.
"""


def bounds(dtype: torch.dtype, layout: Layout) -> Mapping[str, float]:
    """Of a layout with weights in `dtype`."""
    if dtype == torch.float32:
        return BOUNDS
    return BF16_CUT_BOUNDS if layout.tensor > 1 else BF16_BOUNDS


@dataclass(frozen=True)
class Problem:
    """What is computed: model, optimizer, rows of random ids in packed documents of very unequal lengths."""

    model: ModelConfig
    optimizer: OptimizerKind
    seed: int
    rows: int
    micro_batch_size: int
    steps: int
    dtype: torch.dtype = torch.float32
    recompute: Recompute = "none"
    objective: Objective = NEXT_TOKEN
    unlabelled_rows: int = 0
    """The last rows of every batch are documents of one token: no position of them has a label."""
    is_masked: bool = False
    """Whether one id in three, drawn at random, may be no label."""

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        T = self.model.seq_length
        ids = torch.randint(0, self.model.vocab_size, (self.rows, T), generator=generator)
        lengths = []
        for row in range(self.rows):
            # From one document a row to many of one token, which have no label: no two processes have equal shares.
            cuts = int(torch.randint(0, 1 + min(row * T // (2 * self.rows), T - 1), (), generator=generator))
            cuts = T - 1 if row >= self.rows - self.unlabelled_rows else cuts
            ends = sorted({T, *(torch.randperm(T - 1, generator=generator)[:cuts] + 1).tolist()})
            lengths.append([end - start for start, end in zip([0, *ends], ends, strict=False)])
        mask = torch.rand(ids.shape, generator=generator) > 1 / 3 if self.is_masked else None
        return Batch(ids, lengths, mask)


@dataclass
class Numbers:
    """What one engine computed."""

    held_out: float
    steps: list[dict[str, float]]
    """`loss`, the mean of every term by name, `norm`, `clip` by step."""
    gradients: dict[str, np.ndarray]
    """Of the first step, after clipping, by global name."""
    moving: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Buffers that the first step moved, by global name."""


def local_engine(problem: Problem, device: torch.device) -> LocalEngine:
    return LocalEngine(
        problem.model,
        problem.optimizer,
        seed=problem.seed,
        device=device,
        dtype=problem.dtype,
        micro_batch_size=problem.micro_batch_size,
        recompute=problem.recompute,
        objective=problem.objective,
    )


def parallel_engine(
    problem: Problem, groups: process_groups.Groups, engine_type: type[ParallelEngine] = ParallelEngine
) -> ParallelEngine:
    return engine_type(
        problem.model,
        problem.optimizer,
        groups,
        seed=problem.seed,
        dtype=problem.dtype,
        micro_batch_size=problem.micro_batch_size,
        recompute=problem.recompute,
        objective=problem.objective,
    )


def reference(problem: Problem, device: torch.device) -> Numbers:
    """The local engine's numbers."""
    engine = local_engine(problem, device)
    nats, labels = engine.evaluate(problem.batch(-1))
    steps = [_step(engine, problem, 0)]
    taken = {
        name: problem.optimizer.first_gradient(engine.optimizer.state[master])
        for name, master in engine.masters.items()
    }
    gradients = {name: gradient.cpu().numpy() for name, gradient in engine._views(taken).items()}
    moving = _moving(engine.state_tensors())
    steps += [_step(engine, problem, step) for step in range(1, problem.steps)]
    buffers = {key.partition(".")[2] for key in engine.tensors() if key.startswith(("frozen.", "moving."))}
    return Numbers(nats / labels, steps, {n: g for n, g in gradients.items() if n not in buffers}, moving)


def _step(engine: Engine, problem: Problem, step: int) -> dict[str, float]:
    result = engine.forward_backward(problem.batch(step)[engine.rows_of_step(problem.rows)])
    norm = engine.step(problem.optimizer.lr)
    limit = problem.optimizer.clip_grad
    return {"loss": result.loss, **result.terms, "norm": norm, "clip": min(1.0, limit / norm) if limit else 1.0}


def _moving(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies, by global name, of those that guards move."""
    return {k.partition(".")[2]: t.cpu().numpy().copy() for k, t in tensors.items() if k.startswith("moving.")}


def run_layout(
    process: Process,
    layout: Layout,
    problem: Problem,
    expected: Numbers,
    device_type: str,
    engine_type: type[ParallelEngine],
) -> dict[str, Any]:
    """One process's part of a layout's certificate: its numbers, and its squared gradient deviations by global name."""
    prepare_environment(device_type, tensor=layout.tensor)
    device = torch.device(f"cuda:{process.local_rank}" if device_type == "cuda" else device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    process_groups.join(process, device, timeout_seconds=120)
    groups = process_groups.make_groups(layout, device)
    engine = parallel_engine(problem, groups, engine_type)
    nats, labels = engine.evaluate(problem.batch(-1))
    steps = [_step(engine, problem, 0)]
    deviations = _gradient_deviations(engine, problem.optimizer, expected.gradients)
    moving = _moving(engine.buffers(["moving"]))
    steps += [_step(engine, problem, step) for step in range(1, problem.steps)]
    found = {"held_out": nats / labels, "steps": steps, "gradients": deviations, "moving": moving}
    dist.barrier()
    process_groups.leave()
    return found


def _gradient_deviations(
    engine: ParallelEngine, optimizer: OptimizerKind, expected: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float, bool]]:
    """Global name -> (squared difference, squared norm of what was applied, whether it is a slice)."""
    deviations, state = {}, inner_optimizer(engine.deepspeed).state
    for weight in engine.weights:
        applied = engine._gathered(weight, lambda flat: optimizer.first_gradient(state[flat])).cpu()
        if engine._data_group(weight).rank() != 0:
            continue
        for part in engine.global_parts[weight.name]:
            here = part.of(applied)
            if part.name not in expected:  # one process has no gradient: then ZeRO takes zeros
                whole = torch.zeros_like(here)
            else:
                whole = torch.from_numpy(expected[part.name])
                if part.cut is not None:
                    whole = whole.chunk(engine.layout.tensor, part.cut)[engine.groups.tensor.rank()]
            difference = (here.double() - whole.double()).square().sum()
            deviations[part.name] = (float(difference), float(here.double().square().sum()), part.cut is not None)
    return deviations


@dataclass
class Finding:
    """A layout's largest relative deviations and what is out of bounds."""

    layout: str
    deviations: dict[str, float]
    worst_gradient: str
    drift: list[float]
    """Relative deviation of the loss after 1, 2, ... steps."""
    beyond: list[str]
    """Sentences; empty: certified."""


def compare(name: str, expected: Numbers, ranks: list[dict[str, Any]], bounds: Mapping[str, float] = BOUNDS) -> Finding:
    """Merge what the processes of a layout found."""
    first = expected.steps[0]
    squares: dict[str, tuple[float, float]] = {}
    for rank in ranks:
        for parameter, (difference, applied, is_slice) in rank["gradients"].items():
            before = squares.get(parameter, (0.0, 0.0))
            # Slices add up; whole copies must each be right.
            whole = max(before, (difference, applied), key=lambda square: _sortable(square[0]))
            squares[parameter] = (before[0] + difference, before[1] + applied) if is_slice else whole
    gradients = {}
    for parameter, tensor in expected.gradients.items():
        scale = float(np.linalg.norm(tensor.astype(np.float64)))
        difference = squares[parameter][0] ** 0.5 if parameter in squares else math.inf
        gradients[parameter] = difference / scale if scale else (0.0 if difference == 0 else math.inf)
    worst = max(gradients, key=lambda parameter: _sortable(gradients[parameter]))

    def largest(*keys: str) -> float:
        return max((_relative(rank["steps"][0][key], first[key]) for rank in ranks for key in keys), key=_sortable)

    main, *auxiliary = [key for key in first if key not in ("loss", "norm", "clip")]
    deviations = {
        "loss": largest("loss", main),
        "auxiliary": largest(*auxiliary) if auxiliary else 0.0,
        "norm": largest("norm"),
        "clip": largest("clip"),
        "gradient": gradients[worst],
        "held_out": max((_relative(rank["held_out"], expected.held_out) for rank in ranks), key=_sortable),
    }
    beyond = [
        f"{key} deviates by {value:.2e} (bound {bounds[key]:.0e})"
        + (f": {_names_beyond(gradients, bounds['gradient'])}" if key == "gradient" else "")
        for key, value in deviations.items()
        if not value <= bounds[key]
    ]
    if expected.moving:
        moving = [rank["moving"] for rank in ranks]
        deviations["balance"], sentences = _compare_moving(expected.moving, moving, bounds["balance"])
        beyond += sentences
    drift = [_relative(ranks[0]["steps"][i]["loss"], step["loss"]) for i, step in enumerate(expected.steps)]
    return Finding(name, deviations, worst, drift, beyond)


def _compare_moving(
    expected: Mapping[str, np.ndarray], ranks: list[dict[str, np.ndarray]], bound_of_means: float
) -> tuple[float, list[str]]:
    """Largest absolute difference of what guards moved, on any rank, and what is out of bounds, in one sentence."""
    largest, wrong = 0.0, []
    for name, tensor in expected.items():
        found = [rank[name] for rank in ranks if name in rank]
        difference = max((_sortable(float(np.abs(each - tensor).max())) for each in found), default=math.inf)
        bound = bound_of_means if name.endswith(".mean") else 0.0
        largest = max(largest, difference)
        if difference > bound:
            wrong.append((difference, name))
    named = ", ".join(name for _, name in sorted(wrong, reverse=True)[:3])
    sentence = f"balance deviates by {largest:.2e} in {len(wrong)} tensors, which only means may, worst {named}"
    return largest, [sentence] if wrong else []


def _names_beyond(gradients: Mapping[str, float], bound: float) -> str:
    bad = sorted((p for p, v in gradients.items() if not v <= bound), key=lambda p: -gradients[p])
    return f"{len(bad)} parameters, worst {', '.join(bad[:3])}"


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found - expected)


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def certify(
    layout: Layout,
    problem: Problem,
    expected: Numbers,
    *,
    device_type: str,
    engine_type: type[ParallelEngine] = ParallelEngine,
) -> Finding:
    """Run `layout` in processes of this machine and compare.  Raises RuntimeError when a process fails."""
    name = layout.name + (f" recompute {problem.recompute}" if problem.recompute != "none" else "")
    given = (layout, problem, expected, device_type, engine_type)
    ranks = run_ranks(run_layout, layout.world, *given, timeout_seconds=300)
    return compare(name, expected, ranks, bounds(problem.dtype, layout))


def in_one_process(problem: Problem, device_type: str) -> Numbers:
    """`reference` in a process of its own, so that the caller's stays fit for forking."""
    return run_ranks(_reference_rank, 1, problem, device_type, timeout_seconds=300)[0]


def _reference_rank(process: Process, problem: Problem, device_type: str) -> Numbers:
    return reference(problem, torch.device(device_type))


_PP2_VP2 = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, tuple[int, ParallelConfig, Recompute]] = {
    name: (world, ParallelConfig(**keys), recompute)  # type: ignore[arg-type]
    for name, world, keys, recompute in (
        ("dp2_z1", 2, {"zero_stage": 1}, "none"),
        ("tp2", 2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}, "none"),
        ("pp2", 2, {"pipeline": 2, "zero_stage": 1}, "none"),
        ("pp2_interleaved", 2, {**_PP2_VP2, "zero_stage": 1}, "none"),
        ("pp2_vp2_uneven", 2, {**_PP2_VP2, "stage_layers": (3, 2, 2, 1), "zero_stage": 1}, "none"),
        ("pp4_interleaved", 4, {"pipeline": 4, "virtual_pipeline": 2, "zero_stage": 1}, "none"),
        ("pp4_uneven", 4, {"pipeline": 4, "stage_layers": (3, 2, 2, 1), "zero_stage": 1}, "none"),
        ("ep2", 2, {"expert": 2, "zero_stage": 1}, "none"),
        ("ep4", 4, {"expert": 4, "zero_stage": 1}, "none"),
        ("ep2_world4", 4, {"expert": 2, "zero_stage": 1}, "none"),
        ("tp2_pp2", 4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "zero_stage": 1}, "none"),
        ("tp2_ep2", 2, {"tensor": 2, "sequence_parallel": True, "expert": 2, "zero_stage": 1}, "none"),
        ("tp2_ep2_dp2", 4, {"tensor": 2, "sequence_parallel": True, "expert": 2, "zero_stage": 1}, "none"),
        ("tp2_ep4", 4, {"tensor": 2, "sequence_parallel": True, "expert": 4, "zero_stage": 1}, "none"),
        ("pp2_ep2", 4, {"pipeline": 2, "expert": 2, "zero_stage": 1}, "none"),
        ("pp2_dp2", 4, {"pipeline": 2, "zero_stage": 1}, "none"),
        ("tp2_dp2", 4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}, "none"),
        ("dp2_z2", 2, {"zero_stage": 2}, "none"),
        ("dp2_z3", 2, {"zero_stage": 3}, "none"),
        ("ep2_z2", 2, {"expert": 2, "zero_stage": 2}, "none"),
        ("tp2_dp2_z2", 4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 2}, "none"),
        ("tp2_dp2_z3", 4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 3}, "none"),
        ("dp2_z2_offload", 2, {"zero_stage": 2, "offload_optimizer": True}, "none"),
        ("dp2_z3_offload", 2, {"zero_stage": 3, "offload_optimizer": True}, "none"),
        ("tp2_pp2_recompute", 4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "zero_stage": 1}, "full"),
        ("pp2_ep2_recompute", 4, {"pipeline": 2, "expert": 2, "zero_stage": 1}, "selective"),
        ("dp2_z3_recompute", 2, {"zero_stage": 3}, "full"),
    )
}
"""Name -> (processes, parallel keys, recompute).  stage_layers are those of eight layers."""


def suits(model: ModelConfig, name: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the model's family has what the layout of this name takes, and the layers that it hands out."""
    _, p, recompute = LAYOUTS[name]
    if p.stage_layers is not None and sum(p.stage_layers) != model.num_layers:
        return False
    spread = all(getattr(p, key) == 1 or key in model.lays_out for key in ("tensor", "pipeline", "expert"))
    # ZeRO-3 gathers parameters of one dtype.
    one_dtype = p.zero_stage < 3 or dtype.itemsize > 2 or not model.has_wide_parameters
    return spread and one_dtype and recompute in model.recompute_choices and (p.zero_stage < 2 or model.row_is_one_pass)


def write_json(path: Path, findings: Mapping[str, list[Finding]], header: Mapping[str, Any]) -> None:
    """fp32 as `bounds` and `layouts`, bf16 under names of its own; `findings`: by dtype."""
    table = dict(header)
    if "float32" in findings:
        table |= {"bounds": BOUNDS, "layouts": [dataclasses.asdict(finding) for finding in findings["float32"]]}
    if "bfloat16" in findings:
        table |= {"bounds_bfloat16": BF16_BOUNDS, "bounds_bfloat16_tensor": BF16_CUT_BOUNDS}
        table["layouts_bfloat16"] = [dataclasses.asdict(finding) for finding in findings["bfloat16"]]
    write_durably(path, json.dumps(table, indent=1).encode() + b"\n")
