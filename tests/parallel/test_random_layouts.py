"""Random small models under random legal layouts compute what the local engine computes."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.job.process import Process
from lfm.layers.liquid import ReservoirConfig
from lfm.layers.moe import MoE
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.lfm import LFMConfig
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.training.certificate import Problem, certify, in_one_process, local_engine, parallel_engine
from lfm.training.local_engine import LocalEngine
from lfm.training.optimizer.adamw import AdamWConfig
from tests.nested import nested
from tests.parallel.engine_numbers import CPU, deviations, join, train

pytestmark = pytest.mark.slow

RANDOM = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # each example starts processes: shrinking would take an hour
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Example:
    layout: Layout
    problem: Problem


def _parallel(world: int, tensor: int, pipeline: int, virtual: int, expert: int, zero: int, offload: bool) -> bool:
    """Whether sizes are legal for some model."""
    data = world // (tensor * pipeline)
    return (
        world % (pipeline * math.lcm(tensor, expert)) == 0
        and data >= 1
        and (virtual == 1 or pipeline > 1)
        and (zero == 1 or pipeline == 1)
        and not (zero == 3 and expert > 1)
        and not (zero == 2 and expert > 1 and tensor > 1)
        and not (offload and zero < 2)
    )


SIZES = [
    sizes
    for world in (1, 2, 4)
    for tensor in (1, 2, 4)
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1))
    for expert in (1, 2, 4)
    for zero in (1, 2, 3)
    for offload in (False, True)
    if _parallel(*(sizes := (world, tensor, pipeline, virtual, expert, zero, offload)))
]


@st.composite
def examples(draw: st.DrawFn, steps: int, smooth: bool) -> Example:
    """`smooth`: Adam's eps is above the gradients, so that updates do not amplify rounding."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    world, tensor, pipeline, virtual, expert, zero, offload = draw(st.sampled_from(SIZES))
    groups = tensor * one_of(1, 2)
    heads = groups * one_of(1, 2)
    chunks = pipeline * virtual
    num_layers = draw(st.integers(chunks, max(3, chunks + 1)))
    stage_layers = None
    if chunks > 1 and draw(st.booleans()):
        cuts = sorted(draw(st.permutations(range(1, num_layers)))[: chunks - 1])
        stage_layers = tuple(b - a for a, b in zip([0, *cuts], [*cuts, num_layers], strict=True))
    experts = expert * draw(st.integers(-(-2 // expert), 8 // expert))
    top_k = draw(st.integers(1, min(3, experts)))
    # The one expert of a token always weighs 1: without auxiliary losses its router's gradient is nothing but rounding.
    balance = one_of(0.0, 0.01, 1.0) if top_k > 1 else one_of(0.01, 1.0)
    liquid = None
    if draw(st.integers(0, 3)):
        norm, reservoirs = one_of("pre", "post"), draw(st.integers(1, 3))
        liquid = ReservoirConfig(
            interval=draw(st.integers(1, 3)),
            num_reservoirs=reservoirs,
            reservoir_size=one_of(4, 8, 12),
            connectivity=one_of(0.3, 1.0),
            input_scaling=one_of(1.0, 0.5) if norm == "pre" else 1.0,
            norm=norm,
            train_reservoir=draw(st.booleans()),
            backend=one_of("auto", "sequential", "chunked"),
            chunk_length=one_of(8, 16),
            warmup=32,
        )
    parts = nested(
        hidden_size=heads * one_of(2, 4, 6) if heads > 1 else 8,
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        seq_length=one_of(8, 12, 20, 64),
        vocab_size=draw(st.integers(3, 60)),
        vocab_size_multiple=one_of(4, 32, 64),
        untie_embeddings_and_output_weights=draw(st.booleans()),
        **one_of({"initialization": "unit"}, {"initialization": "published", "init_method_std": 0.2}),
        qk_norm=draw(st.booleans()),
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_ffn_hidden_size=one_of(4, 12),
        moe_capacity_factor=one_of(None, None, 0.6, 1.0),
        balance={"coeff": balance},
        moe_z_loss_coeff=one_of(0.0, 0.001, 0.1),
        liquid=liquid,
    )
    model = LFMConfig(**parts)
    optimizer = AdamWConfig(
        lr=0.01,
        betas=one_of((0.9, 0.95), (0.0, 0.5)),
        eps=one_of(0.01, 0.1) if smooth else 1e-8,
        weight_decay=one_of(0.0, 1.0, 10.0),
        clip_grad=one_of(0.0, 1e-3, 0.03, 1e4),
    )
    micro_batch_size = one_of(1, 2)
    micro_batches = draw(st.integers(1, 2)) * (pipeline if virtual > 1 else 1)
    rows = world // (tensor * pipeline) * micro_batch_size * micro_batches
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        expert=expert,
        sequence_parallel=tensor > 1,
        stage_layers=stage_layers,
        zero_stage=zero,
        offload_optimizer=offload,
    )
    layout = check_layout(model, parallel, world, global_batch_size=rows, micro_batch_size=micro_batch_size)
    problem = Problem(
        model=model,
        optimizer=optimizer,
        seed=draw(st.integers(0, 10_000)),
        rows=rows,
        micro_batch_size=micro_batch_size,
        steps=steps,
        recompute=one_of("none", "selective", "full"),
        unlabelled_rows=draw(st.integers(0, rows - 1)),
    )
    return Example(layout, problem)


class Margins:
    """How near the routers of a local engine came to another choice: least logit chosen over largest left, relative."""

    def __init__(self, engine: LocalEngine) -> None:
        self.smallest = math.inf
        for module in engine.model.modules():
            if isinstance(module, MoE):
                module.register_forward_pre_hook(self._see)

    @torch.no_grad()
    def _see(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, MoE)
        if module.top_k == module.router.out_features:
            return
        logits = F.linear(inputs[0], module.router.weight).double()
        top = logits.topk(module.top_k + 1).values
        gaps = (top[..., -2] - top[..., -1]) / logits.abs().amax(-1)
        self.smallest = min(self.smallest, float(gaps.min()))


def _margin_at_start(problem: Problem) -> float:
    """Of the first step and of the held-out rows, which are what is certified."""
    engine = local_engine(problem, CPU)
    margins = Margins(engine)
    with torch.no_grad():
        for step in (-1, 0):
            engine.model.train(step == 0)
            engine.model.losses(problem.batch(step).to(CPU), NEXT_TOKEN)
    return margins.smallest


@RANDOM
@given(examples(steps=1, smooth=False))
def test_one_step_is_within_the_certificate_bounds(example):
    # A choice this near would be rounding's, and every number after it another's.
    assume(_margin_at_start(example.problem) > 3e-6)
    expected = in_one_process(example.problem, "cpu")
    finding = certify(example.layout, example.problem, expected, device_type="cpu")
    assert not finding.beyond, f"{finding.layout}: {finding.beyond} {finding.deviations}"


def _train_local(process: Process, problem: Problem) -> tuple[dict[str, Any], float]:
    engine = local_engine(problem, CPU)
    margins = Margins(engine)
    return train(engine, problem), margins.smallest


def _train_parallel(process: Process, layout: Layout, problem: Problem) -> dict[str, Any]:
    return train(parallel_engine(problem, join(process, layout)), problem, evaluations=1)


@RANDOM
@given(examples(steps=2, smooth=True))
def test_state_after_several_steps_is_the_local_engines(example):
    problem = example.problem
    [(expected, margin)] = run_ranks(_train_local, 1, problem)
    assume(margin > 3e-5)
    [(start, _)] = run_ranks(_train_local, 1, replace(problem, steps=0))
    ranks = run_ranks(_train_parallel, example.layout.world, example.layout, problem, timeout_seconds=120)
    for rank in ranks:
        assert rank["counters"] == expected["counters"]
        nats, labels = expected["held_out"]
        assert rank["held_out"] == (pytest.approx(nats, rel=1e-5), labels)
        for (got, norm), (want, wanted_norm) in zip(rank["steps"], expected["steps"], strict=True):
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
            assert got.loss == pytest.approx(want.loss, rel=1e-5)
            assert (got.counts, got.attended_pairs) == (want.counts, want.attended_pairs)
            assert got.measured.keys() == want.measured.keys()
            near = {"reservoir_residual": {"rel": 1e-2, "abs": 1e-5}, "reservoir_saturation": {"abs": 1e-6}}
            for name, values in want.measured.items():
                # Whole numbers are equal.
                exact = {"rel": 0, "abs": 0} if "gain" not in name else {"abs": 1e-6}
                assert got.measured[name] == pytest.approx(values, **near.get(name, exact)), name
    found = deviations(ranks, expected, start)
    beyond = {key: value for key, value in found.items() if not value <= (0 if key.startswith("frozen.") else 1e-3)}
    worst = dict(sorted(beyond.items(), key=lambda item: -item[1])[:5])
    assert not beyond, f"{example.layout.name}, router margin {margin:.1e}: {worst}"
