"""When ZeRO-1's buckets travel: what equal numbers do not show."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.job.process import Process
from lfm.layers.attention import AttentionConfig
from lfm.layers.moe import MoEConfig
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.lfm import LFMConfig
from lfm.training.certificate import Problem, local_engine, parallel_engine
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.groups import parameter_groups, split_groups
from tests.parallel.engine_numbers import CPU, join, state

TINY = LFMConfig(
    hidden_size=16,
    num_layers=3,
    seq_length=16,
    vocab_size=30,
    vocab_size_multiple=64,
    attention=AttentionConfig(num_attention_heads=4, num_query_groups=2),
    ffn=MoEConfig(num_moe_experts=4, moe_ffn_hidden_size=8),
)
PROBLEM = Problem(TINY, AdamWConfig(lr=1e-2), seed=5, rows=4, micro_batch_size=1, steps=1)


def _layout(**parallel: Any) -> Layout:
    config = ParallelConfig(zero_stage=1, **parallel)
    return check_layout(TINY, config, 2, global_batch_size=PROBLEM.rows, micro_batch_size=1)


def _travel(process: Process, layout: Layout, problem: Problem) -> dict[str, Any]:
    """What happened to the buckets in a step and in the forward pass behind it, each named by a parameter of it."""
    engine = parallel_engine(problem, join(process, layout))
    zero1 = engine.deepspeed.optimizer
    engine.evaluate(problem.batch(-1))
    # The first step shows how often each parameter is added to.
    engine.forward_backward(problem.batch(0)[engine.rows_of_step(problem.rows)])
    engine.step(1e-2)
    events: list[str] = []
    reduce = zero1._reduce

    def recorded(bucket: Any) -> None:
        events.append(zero1.param_names[bucket.parameters[0]])
        reduce(bucket)

    zero1._reduce = recorded
    embedding = engine.pieces[0].embedding.weight
    embedding.register_post_accumulate_grad_hook(lambda _: events.append("the end of a backward pass"))
    engine.forward_backward(problem.batch(1)[engine.rows_of_step(problem.rows)])
    engine.step(1e-2)

    under_way = {}

    def behind(number: str) -> None:
        names = {zero1.param_names[p] for b in zero1.buckets if b.gathering is not None for p in b.parameters}
        under_way.setdefault(number, names)

    for number, layer in engine.pieces[0].layers.items():
        layer.register_forward_hook(lambda *_, number=number: behind(number))
    before = [bucket.gathering is not None for bucket in zero1.buckets]
    engine.evaluate(problem.batch(-1))
    return {
        "optimizer": type(zero1).__name__,
        "events": events,
        "forward": [zero1.param_names[bucket.parameters[0]] for bucket in zero1.buckets],
        "before": before,
        "under_way": under_way,
        "after": [bucket.gathering is not None for bucket in zero1.buckets],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buckets_leave_during_the_last_backward_and_come_back_under_the_next_forward(dtype):
    ranks = run_ranks(_travel, 2, _layout(), dataclasses.replace(PROBLEM, dtype=dtype), timeout_seconds=60)
    for found in ranks:
        assert found["optimizer"] == "Zero1"
        end = "the end of a backward pass"
        first, *others = found["forward"]
        assert first == "embedding.weight" and len(others) > 3 * TINY.num_layers
        # Two micro-batches; all leave in the second, the embedding with its last gradient.
        assert [event for event in found["events"] if event != end] == [*others[::-1], first]
        assert found["events"].count(end) == 2 and found["events"][-2:] in ([first, end], [end, first])
        assert found["events"][0] == end
        assert all(found["before"]) and not any(found["after"])
        for number, under_way in found["under_way"].items():
            assert not any(name.startswith(f"layers.{number}.") for name in under_way)
        assert any(name.startswith("layers.2.") for name in found["under_way"]["0"])


def _of_unequal_sizes(process: Process, layout: Layout | None) -> dict[str, Any]:
    """Loss and norm of steps of 2 and 4 rows in turn, and how many buckets had left when their passes ended."""
    engine: Any = local_engine(PROBLEM, CPU) if layout is None else parallel_engine(PROBLEM, join(process, layout))
    zero1: Any = None if layout is None else engine.deepspeed.optimizer
    steps: list[tuple[float, float]] = []
    left: list[int] = []
    if zero1 is not None:
        finish = zero1.finish_gradients

        def finished() -> None:
            left.append(zero1._reduced)
            finish()

        zero1.finish_gradients = finished
    for step, rows in enumerate((2, 4, 2, 4)):
        batch = dataclasses.replace(PROBLEM, rows=rows).batch(step)
        result = engine.forward_backward(batch[engine.rows_of_step(rows)])
        steps.append((result.loss, engine.step(1e-4)))
    return {"steps": steps, "left": left, "buckets": len(zero1.buckets) if zero1 is not None else 0}


def test_steps_may_have_other_numbers_of_micro_batches():
    [want] = run_ranks(_of_unequal_sizes, 1, None, timeout_seconds=60)
    for found in run_ranks(_of_unequal_sizes, 2, _layout(), timeout_seconds=60):
        # The first step of a number of micro-batches shows what to await in others of as many.
        assert found["left"] == [0, 0, found["buckets"], found["buckets"]] and found["buckets"] > 3
        for got, expected in zip(found["steps"], want["steps"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


def _broken_off(process: Process, layout: Layout) -> list[bool]:
    """After a backward pass that an exception ended under way: whether the next step is that of an engine without."""
    groups = join(process, layout)
    engines = [parallel_engine(PROBLEM, groups) for _ in range(2)]
    own = engines[0].rows_of_step(PROBLEM.rows)

    calls = itertools.count()

    def broken(gradient: Tensor) -> None:
        if next(calls) == 1:
            raise ZeroDivisionError

    for engine in engines:
        engine.forward_backward(PROBLEM.batch(0)[own])
        engine.step(1e-2)
    # Of the first layer and the last micro-batch, so that buckets of later layers have left.
    first = min(weight.name for weight in engines[0].weights if weight.name.endswith("_norm.weight"))
    norm = next(weight.parameter for weight in engines[0].weights if weight.name == first)
    hook, was_broken = norm.register_hook(broken), False
    try:
        engines[0].forward_backward(PROBLEM.batch(1)[own])
    except ZeroDivisionError:
        was_broken = True
    hook.remove()
    norms, states = [], []
    for engine in engines:
        engine.forward_backward(PROBLEM.batch(2)[own])
        norms.append(engine.step(1e-2))
        states.append(state(engine))
    alike = [bool((part[3] == states[1][key][3]).all()) for key, part in states[0].items()]
    return [was_broken, norms[0] == norms[1], all(alike)]


@pytest.mark.slow
def test_a_backward_pass_that_did_not_end_leaves_nothing_to_the_next_step_of_two_ranks():
    for layout in (_layout(), _layout(expert=2)):
        assert run_ranks(_broken_off, 2, layout, timeout_seconds=60) == [[True] * 3] * 2


class Partly(nn.Module):
    """Two of three parameters have a gradient; one of them on rank 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Parameter(torch.ones(5)) for _ in range(3))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return (x * self.always * (self.sometimes if rank == 0 else 1.0)).sum()


def _partly(process: Process, layout: Layout) -> dict[str, Any]:
    from lfm.parallel.zero import Weight, make_engine

    module, config = Partly(), AdamWConfig(lr=1e-2, clip_grad=0)
    weights = [
        Weight(name, p, is_expert=False, is_cut=False, is_copy=False, is_wide=False)
        for name, p in module.named_parameters()
    ]
    groups = split_groups(parameter_groups(config, module.named_parameters()), lambda name: name)
    engine = make_engine(
        module,
        weights,
        join(process, layout),
        build=lambda: config.build(groups),
        update=config.update,
        new_state=config.new_state,
        clip_grad=0.0,
        micro_batch_size=1,
    )
    zero1, sums = engine.optimizer, []
    for step in range(2):
        zero1.start_gradients(leaves_early=True, micro_batches=2)
        for micro_batch in range(2):
            module(torch.full((5,), 1.0 + step + micro_batch), process.rank).backward()
        zero1.finish_gradients()
        sums.append({zero1.param_names[b.parameters[0]]: b.own_gradient.sum().item() for b in zero1.buckets})
    return {"sums": sums, "grads": [p.grad for p in module.parameters()]}


def test_a_parameter_without_gradient_has_one_of_zeros_and_no_step_sees_the_last_ones():
    ranks = run_ranks(_partly, 2, _layout(), timeout_seconds=60)
    for step, each in enumerate(zip(*(found["sums"] for found in ranks), strict=True)):
        total = {name: sum(sums[name] for sums in each) for name in each[0]}
        of_one_rank = 5.0 * ((1 + step) + (2 + step))
        assert total == {"always": 2 * of_one_rank, "sometimes": of_one_rank, "never": 0.0}
    assert all(found["grads"] == [None] * 3 for found in ranks)
