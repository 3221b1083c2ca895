"""What engines compute, in a form that processes hand over and layouts share."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lfm.layout.layout import Layout
from lfm.models.lfm import initial_tensor
from lfm.parallel import groups as process_groups
from lfm.training.certificate import Problem
from lfm.training.engine import Engine

CPU = torch.device("cpu")

Slice = tuple[int, int, int, np.ndarray]
"""Of a tensor: number of this part, number of parts, dimension, values."""


def join(process: Any, layout: Layout) -> process_groups.Groups:
    process_groups.join(process, CPU, timeout_seconds=60)
    return process_groups.make_groups(layout, CPU)


def train(engine: Engine, problem: Problem, evaluations: int = 0) -> dict[str, Any]:
    """All of the problem's steps: `steps` as (StepResult, norm), `state` afterwards, counters and held-out loss."""
    steps = []
    for step in range(problem.steps):
        for _ in range(evaluations):
            engine.evaluate(problem.batch(-1))
        batch = problem.batch(step)[engine.rows_of_step(problem.rows)]
        result = engine.forward_backward(batch)
        norm = engine.step(problem.optimizer.lr * (step + 1))
        steps.append((result, norm))
    return {
        "steps": steps,
        "state": state(engine),
        "held_out": engine.evaluate(problem.batch(-1)),
        "counters": engine.state_values(),
    }


def state(engine: Engine) -> dict[str, Slice]:
    """This process's part of a checkpoint."""
    found = {}
    for key, tensor in engine.state_tensors().items():
        if isinstance(tensor, DTensor):
            shard = tensor.placements[0]
            assert isinstance(shard, Shard)
            place = (tensor.device_mesh.get_local_rank(), tensor.device_mesh.size(), shard.dim)
            found[key] = (*place, tensor.to_local().numpy().copy())
        else:
            found[key] = (0, 1, 0, tensor.detach().numpy().copy())
    return found


def whole_state(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put together from all processes; what is trained must come from one process alone."""
    parts: dict[str, dict[int, Slice]] = {}
    for rank in ranks:
        for key, part in rank["state"].items():
            assert key.startswith("frozen.") or part[0] not in parts.get(key, {}), f"{key} is given twice"
            parts.setdefault(key, {})[part[0]] = part
    whole = {}
    for key, found in parts.items():
        _, count, dim, _ = found[0]
        whole[key] = np.concatenate([found[i][3] for i in range(count)], dim) if count > 1 else found[0][3]
    return whole


def deviations(
    ranks: list[dict[str, Any]], expected: dict[str, Any], start: dict[str, Any] | None = None
) -> dict[str, float]:
    """Norm of the difference over the norm of the tensor, by checkpoint key.

    With the state at the `start`, masters by what the steps moved, less what rounding a weight of its size may differ.
    """
    got, want = whole_state(ranks), whole_state([expected])
    assert got.keys() == want.keys()
    first = whole_state([start]) if start is not None else {}
    found = {}
    for key, tensor in want.items():
        assert got[key].shape == tensor.shape, f"{key}: shape {got[key].shape} instead of {tensor.shape}"
        tensor, rounding = tensor.astype(np.float64), 0.0
        difference, norm = np.linalg.norm(got[key] - tensor), np.linalg.norm(tensor)
        if start is not None and key.startswith("master."):
            rounding = 2**-23 * norm
            norm = np.linalg.norm(tensor - first[key])
        found[key] = max(0.0, difference - rounding) / norm if norm else (math.inf if difference else 0.0)
    return found


def read_initial(problem: Problem, seed: int, edit: Any = lambda name, whole: whole):
    """Fills an engine with the initial values of another seed, each whole tensor passed through `edit`."""

    def read(targets: dict[str, Tensor]) -> None:
        for key, target in targets.items():
            name = key.partition(".")[2]
            whole = edit(name, initial_tensor(name, target.shape, problem.model, seed))
            if isinstance(target, DTensor):
                shard, mesh = target.placements[0], target.device_mesh
                assert isinstance(shard, Shard)
                target.to_local().copy_(whole.chunk(mesh.size(), shard.dim)[mesh.get_local_rank()])
            else:
                target.copy_(whole)

    return read
