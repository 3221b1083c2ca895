"""The way out of a refused layout: the nearest that keeps all rules."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

from lfm.layout.rules import Request, Rule, divisors, first_broken


def refusal(rule: Rule, r: Request) -> str:
    """The sentence of a broken rule: keys and values in conflict, the reason, and the way out."""
    why = f": {rule.why.format(r=r)}" if rule.why else ""
    worlds = _legal_worlds(r)
    world = min(worlds, key=lambda world: (abs(world - r.world), world))
    if world == r.world:
        way_out = f"the nearest legal layout is {_difference(r, _nearest(r))}"
    else:
        other = replace(r, world=world)
        change = "" if first_broken(other) is None else f" with {_difference(r, _nearest(other))}"
        way_out = f"no layout of {r.processes} is legal, the nearest number of processes is {world}{change}"
    return f"{rule.what.format(r=r)}{why}; {way_out}"


def _legal_worlds(r: Request) -> set[int]:
    """Every number of processes that has a legal layout.  Where one has, its plainest form, tried here, is legal."""
    worlds: set[int] = set()
    expert_sizes = r.expert_sizes
    for tensor, pipeline, data in itertools.product(r.tensor_sizes, r.pipeline_sizes, divisors(r.global_batch_size)):
        world = tensor * pipeline * data
        plain = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": 1, "zero_stage": min(1, world - 1)}
        plain |= {"stage_layers": None, "offload_optimizer": False, "micro_batch_size": 1}
        experts = expert_sizes if world not in worlds else ()
        if any(first_broken(_changed(replace(r, world=world), plain | {"expert": n})) is None for n in experts):
            worlds.add(world)
    return worlds


def _nearest(r: Request) -> Request:
    """The legal request with the fewest keys changed, and of those the one with the smallest changes.

    `sequence_parallel` follows `tensor` and is not counted.  `r` must have a legal layout.
    """
    p, sizes, tensor_sizes, expert_sizes = r.p, divisors(r.world), r.tensor_sizes, r.expert_sizes
    # (distance, value): sizes differ by their ratio; what changes memory and speed less counts less.
    choices: dict[str, list[tuple[float, Any]]] = {
        "tensor": [(_ratio(p.tensor, n), n) for n in sizes if n in tensor_sizes],
        "pipeline": [(_ratio(p.pipeline, n), n) for n in sizes if n in r.pipeline_sizes],
        "virtual_pipeline": [
            (_ratio(p.virtual_pipeline, n) / 4, n) for n in range(1, max(p.virtual_pipeline, len(r.stage_layers)) + 1)
        ],
        "expert": [(_ratio(p.expert, n), n) for n in sizes if n in expert_sizes],
        "zero_stage": [(abs(n - p.zero_stage) / 4, n) for n in range(4)],
        "stage_layers": [(0.5, None)],
        "offload_optimizer": [(0.5, False), (0.5, True)],
        "micro_batch_size": [
            (_ratio(r.micro_batch_size, n) / 4, n) for n in divisors(r.global_batch_size) if n < r.micro_batch_size
        ],
    }
    now = {**dict(p), "micro_batch_size": r.micro_batch_size}
    choices = {key: [choice for choice in listed if choice[1] != now[key]] for key, listed in choices.items()}
    for count in range(len(choices) + 1):
        legal: list[tuple[float, Request]] = []
        for keys in itertools.combinations(choices, count):
            for chosen in itertools.product(*(choices[key] for key in keys)):
                values = (value for _, value in chosen)
                candidate = _changed(r, dict(zip(keys, values, strict=True)))
                if first_broken(candidate) is None:
                    legal.append((sum(distance for distance, _ in chosen), candidate))
        if legal:
            return min(legal, key=lambda found: found[0])[1]
    raise AssertionError(f"no legal layout of {r.processes}")


def _changed(r: Request, update: dict[str, Any]) -> Request:
    """`r` with keys of ParallelConfig and `micro_batch_size` replaced; `sequence_parallel` as `tensor` needs it."""
    micro_batch_size = update.get("micro_batch_size", r.micro_batch_size)
    update = {key: value for key, value in update.items() if key != "micro_batch_size"}
    split = update.get("tensor", r.p.tensor) > 1
    return replace(r, p=r.p.model_copy(update=update | {"sequence_parallel": split}), micro_batch_size=micro_batch_size)


def _difference(old: Request, new: Request) -> str:
    """`key=value` text that turns one request into the other."""
    changes = {f"parallel.{key}": value for key, value in dict(new.p).items() if value != getattr(old.p, key)}
    if new.micro_batch_size != old.micro_batch_size:
        changes["training.micro_batch_size"] = new.micro_batch_size
    return " ".join(f"{key}={json.dumps(value)}" for key, value in changes.items())


def _ratio(a: int, b: int) -> float:
    return abs(math.log2(a / b))
