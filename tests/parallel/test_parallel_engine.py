"""The parallel engine where layouts could go wrong in silence; random layouts are in test_random_layouts.py."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.errors import NonFiniteError, UserError
from lfm.job.fork import run_ranks
from lfm.job.process import Process
from lfm.kernels.gradient_sum import gradient_sum
from lfm.layers.liquid import ReservoirConfig
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.lfm import LFMConfig
from lfm.training.certificate import Problem, local_engine, parallel_engine
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.lion import LionConfig
from tests.nested import nested
from tests.parallel.engine_numbers import (
    CPU,
    deviations,
    join,
    read_initial,
    state,
    train,
)

slow = pytest.mark.slow
FP32, BF16 = torch.float32, torch.bfloat16

TP = {"tensor": 2, "sequence_parallel": True}
PP = {"pipeline": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": TP,
    "pp2": PP,
    "ep2": {"expert": 2},
    "tp2_ep2": {**TP, "expert": 2},
    "dp2_z2": {"zero_stage": 2},
    "dp2_z3": {"zero_stage": 3},
    "tp2_z3": {**TP, "zero_stage": 3},
    "dp2_z2_offload": {"zero_stage": 2, "offload_optimizer": True},
    "dp2_z3_offload": {"zero_stage": 3, "offload_optimizer": True},
}


def _problem(*, dtype=FP32, rows=4, steps=1, unlabelled_rows=0, optimizer=None, **model) -> Problem:
    """The moment exp_avg after a step is that step's clipped gradient: betas[0] is 0."""
    liquid = ReservoirConfig(interval=2, num_reservoirs=3, reservoir_size=8, connectivity=0.5, backend="sequential")
    config: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 16,
        "vocab_size": 30,
        "vocab_size_multiple": 64,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 8,
        "liquid": liquid,
    }
    return Problem(
        model=LFMConfig(**nested(**(config | model))),
        optimizer=optimizer or AdamWConfig(lr=1e-2, betas=(0.0, 0.5), eps=1e-2, weight_decay=1.0, clip_grad=0.3),
        seed=5,
        rows=rows,
        micro_batch_size=1,
        steps=steps,
        dtype=dtype,
        unlabelled_rows=unlabelled_rows,
    )


def _layout(problem: Problem, name: str) -> Layout:
    parallel = ParallelConfig(**({"zero_stage": 1} | LAYOUTS[name]))
    return check_layout(problem.model, parallel, 2, global_batch_size=problem.rows, micro_batch_size=1)


@functools.cache
def _expected(problem: Problem, edit: Any = None) -> dict[str, Any]:
    """What the local engine computes."""
    return run_ranks(_local, 1, problem, edit)[0]


def _local(process: Process, problem: Problem, edit: Any = None) -> dict[str, Any]:
    engine = local_engine(problem, CPU)
    if edit is not None:
        engine.load_state_tensors(read_initial(problem, problem.seed, edit), kinds=("master",))
    return train(engine, problem)


def _parallel(process: Process, layout: Layout, problem: Problem, edit: Any = None) -> dict[str, Any]:
    engine = parallel_engine(problem, join(process, layout))
    if edit is not None:
        engine.load_state_tensors(read_initial(problem, problem.seed, edit), kinds=("master",))
    return train(engine, problem)


def _assert_equal(name: str, problem: Problem, edit: Any = None) -> dict[str, Any]:
    """One step of a layout against the local engine; returns what that computed."""
    expected = _expected(problem, edit)
    ranks = run_ranks(_parallel, 2, _layout(problem, name), problem, edit, timeout_seconds=60)
    [(want, wanted_norm)] = expected["steps"]
    for rank in ranks:
        [(got, norm)] = rank["steps"]
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert got.terms == pytest.approx(want.terms, rel=1e-5)
        assert got.measured["expert_load"] == want.measured["expert_load"]
        assert got.counts == want.counts
    found = deviations(ranks, expected)
    beyond = {key: value for key, value in found.items() if not value <= 1e-4}
    assert not beyond
    return expected


@pytest.mark.parametrize("norm", ["pre", pytest.param("post", marks=slow)])
def test_reservoirs_train_under_tensor_parallelism(norm):
    liquid = ReservoirConfig(
        interval=1,
        num_reservoirs=3,
        reservoir_size=8,
        connectivity=0.5,
        norm=norm,
        train_reservoir=True,
        backend="sequential",
    )
    expected = _assert_equal("tp2", _problem(liquid=liquid))
    _, _, _, gradient = expected["state"]["exp_avg.layers.0.liquid.reservoirs.0.weight"]
    _, _, _, connected = expected["state"]["frozen.layers.0.liquid.reservoirs.0.connections"]
    assert gradient[connected].any() and not gradient[~connected].any()


def _hundredth_update(engine: Any, problem: Problem) -> dict[str, Any]:
    engine.optimizer_step = 99
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = train(engine, problem)
    return found | {"warned": sum("forget too slowly" in str(warning.message) for warning in warned)}


def _parallel_hundredth_update(process: Process, layout: Layout, problem: Problem) -> dict[str, Any]:
    return _hundredth_update(parallel_engine(problem, join(process, layout)), problem)


@pytest.mark.parametrize("name", ["dp2_z3", "tp2", *(pytest.param(n, marks=slow) for n in ("dp2", "dp2_z2", "pp2"))])
def test_reservoirs_that_no_longer_forget_are_scaled_alike(name):
    liquid = ReservoirConfig(
        interval=1,
        num_reservoirs=2,
        reservoir_size=8,
        connectivity=0.5,
        spectral_radius=3.0,
        train_reservoir=True,
        backend="chunked",
        chunk_length=8,
    )
    problem = _problem(liquid=liquid)
    expected = _hundredth_update(local_engine(problem, CPU), problem)
    ranks = run_ranks(_parallel_hundredth_update, 2, _layout(problem, name), problem, timeout_seconds=60)
    found = deviations(ranks, expected)
    assert not {key: value for key, value in found.items() if not value <= 1e-4}
    assert expected["warned"] == sum(rank["warned"] for rank in ranks) == problem.model.num_layers


@pytest.mark.parametrize("name", ["dp2", "dp2_z3", pytest.param("dp2_z2", marks=slow)])
def test_a_data_rank_may_have_no_label(name):
    _assert_equal(name, _problem(unlabelled_rows=2))


def test_a_whole_step_may_have_no_label():
    expected = _assert_equal("dp2", _problem(unlabelled_rows=4))
    assert expected["steps"][0][0].counts.labels == 0


def _to_expert_2(name: str, whole: torch.Tensor) -> torch.Tensor:
    """Every token's first feature is large, and only expert 2's router looks at it; the next ones lose in order."""
    if name == "embedding.weight":
        whole[:, 0] = 3.0
    if name.endswith("router.weight"):
        whole.mul_(0.01)[:, 0] = torch.tensor([-2.0, -1.0, 2.0, -3.0])
    return whole


@pytest.mark.parametrize(
    "name", ["ep2", "tp2", "tp2_ep2", *(pytest.param(n, marks=slow) for n in ("dp2_z2", "dp2_z3"))]
)
def test_one_expert_may_take_all_tokens_and_the_others_none(name):
    problem = _problem(moe_router_topk=1, liquid=None)
    expected = _assert_equal(name, problem, _to_expert_2)
    assert expected["steps"][0][0].measured["expert_load"] == {0: [0, 0, 4 * 16, 0], 1: [0, 0, 4 * 16, 0]}


EXCEPTIONS = (
    {"match": "embedding.weight", "lr_multiple": 0.25, "weight_decay": 0.0},
    {"match": "*norm.weight", "lr_multiple": 2.0, "weight_decay": 0.5},
    {"match": "*.moe.down", "lr_multiple": 3.0},
    {"match": "*.router.weight", "lr_multiple": 0.0},
)


def _with_groups(*groups: dict[str, Any]) -> Problem:
    settings = {"lr": 1e-2, "eps": 1e-2, "clip_grad": 0.3, "weight_decay": 1.0, "groups": groups}
    return _problem(steps=2, liquid=None, optimizer=AdamWConfig.model_validate(settings))


@pytest.mark.parametrize(
    "name",
    ["dp2", "pp2", "dp2_z3", "tp2_ep2", *(pytest.param(n, marks=slow) for n in ("dp2_z2", "ep2", "dp2_z3_offload"))],
)
def test_groups_of_parameters_have_their_rates_and_decays_under_every_layout(name):
    problem = _with_groups(*EXCEPTIONS)
    start, expected = {"state": state(local_engine(problem, CPU))}, _expected(problem)
    ranks = run_ranks(_parallel, 2, _layout(problem, name), problem, timeout_seconds=60)
    assert not {key: value for key, value in deviations(ranks, expected, start).items() if not value <= 1e-4}


@pytest.mark.parametrize("name", ["dp2_z3", *(pytest.param(n, marks=slow) for n in ("dp2", "dp2_z2_offload", "tp2"))])
def test_another_kind_of_optimizer_is_the_local_engines(name):
    problem = _problem(steps=2, optimizer=LionConfig(lr=1e-3, betas=(0.5, 0.9), weight_decay=1.0, clip_grad=0.3))
    start, expected = {"state": state(local_engine(problem, CPU))}, _expected(problem)
    ranks = run_ranks(_parallel, 2, _layout(problem, name), problem, timeout_seconds=60)
    found = deviations(ranks, expected, start)
    assert any(key.startswith("exp_avg.") for key in found) and not any("exp_avg_sq" in key for key in found)
    assert not {key: value for key, value in found.items() if not value <= 1e-4}


def _refused(process: Process, layout: Layout, problem: Problem) -> str:
    try:
        parallel_engine(problem, join(process, layout))
    except UserError as error:
        return str(error)
    return ""


def test_a_name_that_matches_nothing_is_refused_on_every_rank():
    problem = _with_groups({"match": "layers.0.attention.q.weight", "weight_decay": 0.5})
    first, second = run_ranks(_refused, 2, _layout(problem, "pp2"), problem, timeout_seconds=60)
    assert first == second and first.startswith(
        "optimizer.groups: match=layers.0.attention.q.weight is the name of no parameter; some are "
        "layers.0.attention.qkv.weight, "
    )


def test_a_group_may_have_parameters_of_one_stage_alone():
    problem = _with_groups({"match": "final_norm.weight", "weight_decay": 0.5, "lr_multiple": 3.0})
    start, expected = {"state": state(local_engine(problem, CPU))}, _expected(problem)
    ranks = run_ranks(_parallel, 2, _layout(problem, "pp2"), problem, timeout_seconds=60)
    assert not {key: value for key, value in deviations(ranks, expected, start).items() if not value <= 1e-4}


def _spoil_gradient(weight: torch.Tensor) -> Callable[[], None]:
    """Let it be NaN, wherever it goes; what ends that."""
    found = gradient_sum(weight)
    if found is None:
        return weight.register_hook(lambda gradient: gradient * torch.nan).remove
    after = found.after
    assert after is not None

    def spoilt() -> None:
        found.total.fill_(torch.nan)
        after()

    found.after = spoilt
    return lambda: setattr(found, "after", after)


def _fail(process: Process, layout: Layout, problem: Problem) -> dict[str, Any]:
    """What the engine says to a gradient, then to a weight, that is NaN on rank 1 alone."""
    engine = parallel_engine(problem, join(process, layout))
    batch, own = problem.batch(0), engine.rows_of_step(problem.rows)
    engine.evaluate(batch)
    before, said = state(engine), []
    qkv = next(weight.parameter for weight in engine.weights if weight.name.endswith("qkv.weight"))
    restore = _spoil_gradient(qkv) if process.rank == 1 else None
    engine.forward_backward(batch[own])
    try:
        engine.step(0.1)
    except NonFiniteError as error:
        said.append(str(error))
    if restore is not None:
        restore()
        with torch.no_grad():
            getattr(qkv, "ds_tensor", qkv).data.fill_(torch.nan)
    try:
        engine.forward_backward(batch[own])
    except NonFiniteError as error:
        said.append(str(error))
    after = state(engine)
    moved = [key for key in before if (before[key][3] != after[key][3]).any()]
    return {"said": said, "moved": moved, "optimizer_step": engine.optimizer_step}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, FP32) for name in ("tp2", "pp2", "dp2_z3")),
        *((name, BF16) for name in ("ep2", "dp2_z2")),
        *(pytest.param(n, FP32, marks=slow) for n in ("dp2", "ep2", "dp2_z2", "tp2_z3")),
        *(pytest.param(n, FP32, marks=slow) for n in ("dp2_z2_offload", "dp2_z3_offload")),
        *(pytest.param(n, BF16, marks=slow) for n in ("dp2", "tp2", "dp2_z3")),
    ],
)
def test_nan_on_one_rank_ends_every_rank_without_an_update(name, dtype):
    problem = _problem(dtype=dtype)
    for found in run_ranks(_fail, 2, _layout(problem, name), problem, timeout_seconds=60):
        assert len(found["said"]) == 2
        assert "gradient norm is not finite" in found["said"][0]
        named = "first non-finite gradient: layers." in found["said"][0]
        assert named == (_layout(problem, name).zero_stage == 1)
        assert "loss is not finite" in found["said"][1]
        assert found["moved"] == []
        assert found["optimizer_step"] == 0


def _evaluate(process: Process, layout: Layout | None, problem: Problem) -> list[tuple[float, int]]:
    engine = local_engine(problem, CPU) if layout is None else parallel_engine(problem, join(process, layout))
    found = []
    for rows in (1, 3, 6):
        found.append(engine.evaluate(dataclasses.replace(problem, rows=rows, unlabelled_rows=rows // 3).batch(7)))
    return found


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2", "dp2_z3", pytest.param("ep2", marks=slow)])
def test_held_out_loss_of_any_number_of_rows_is_the_local_engines(name):
    problem = _problem(moe_capacity_factor=0.5)
    [expected] = run_ranks(_evaluate, 1, None, problem)
    for found in run_ranks(_evaluate, 2, _layout(problem, name), problem):
        assert found == [(pytest.approx(nats, rel=1e-5), labels) for nats, labels in expected]


def _copies(process: Process, layout: Layout, problem: Problem) -> dict[str, list[bool]]:
    """After steps, whether weights held whole by several processes are bitwise alike there."""
    groups = join(process, layout)
    engine = parallel_engine(problem, groups)
    train(engine, problem)
    found: dict[str, list[bool]] = {"tensor": [], "embedding": []}

    def alike(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.detach().contiguous(), group=group)
        return all(torch.equal(part, parts[0]) for part in parts)

    for weight in engine.weights:
        if not weight.is_cut and not weight.is_expert and layout.tensor > 1:
            found["tensor"].append(alike(weight.parameter, groups.tensor))
        if weight.name == "embedding.weight" and groups.embedding is not None:
            found["embedding"].append(alike(weight.parameter, groups.embedding))
    return found


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    # Whole on tensor ranks, of each of two layers: three norms, router, output bias, reservoir; and the final norm.
    [
        pytest.param("tp2", "tensor", 2 * 6 + 1, marks=slow),
        ("tp2_ep2", "tensor", 2 * 6 + 1),
        ("pp2", "embedding", 1),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=slow)], ids=str)
def test_copies_of_a_weight_stay_bitwise_alike(name, kind, count, dtype):
    liquid = ReservoirConfig(interval=1, num_reservoirs=1, reservoir_size=8, connectivity=0.5, train_reservoir=True)
    problem = _problem(dtype=dtype, steps=2, liquid=liquid)
    for found in run_ranks(_copies, 2, _layout(problem, name), problem):
        assert found[kind] == [True] * count


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("dp2", 1e-6),
        # Stages 2 and 3 take each micro-batch's gradient in bf16, where products elsewhere add to a sum in fp32.
        *((name, 1e-2) for name in ("dp2_z2", "dp2_z3")),
        *(pytest.param(name, 1e-2, marks=slow) for name in ("dp2_z2_offload", "dp2_z3_offload")),
        # Tokens of two processes meet in one product of an expert; the embedding's two gradients are rounded apart.
        *((name, 1e-2) for name in ("ep2", "pp2")),
        # Summands of a matrix product are rounded apart.
        ("tp2_ep2", 3e-2),
        pytest.param("tp2", 3e-2, marks=slow),
    ],
)
def test_bf16_gradients_at_equal_weights_are_the_local_engines(name, bound):
    problem = _problem(dtype=BF16, initialization="published")
    expected = _expected(problem)
    ranks = run_ranks(_parallel, 2, _layout(problem, name), problem, timeout_seconds=60)
    [(want, wanted_norm)] = expected["steps"]
    [(got, norm)] = ranks[0]["steps"]
    assert got.measured["expert_load"] == want.measured["expert_load"]  # no router came near another choice
    assert norm == pytest.approx(wanted_norm, rel=1e-3)
    assert got.loss == pytest.approx(want.loss, rel=1e-4)
    gradients = {key: value for key, value in deviations(ranks, expected).items() if key.startswith("exp_avg.")}
    assert max(gradients.values()) < bound, max(gradients, key=lambda key: gradients[key])


def _refill(process: Process, layout: Layout, problem: Problem) -> bool:
    """Whether an engine that has worked and takes another's state then works like that other, bit by bit."""
    groups = join(process, layout)
    other_seed = dataclasses.replace(problem, seed=problem.seed + 1)
    engine, other = parallel_engine(problem, groups), parallel_engine(other_seed, groups)
    train(engine, problem)
    engine.evaluate(problem.batch(-1))

    def read(targets: dict[str, torch.Tensor]) -> None:
        moments = {key: target for key, target in targets.items() if key.startswith(("exp_avg", "moving"))}
        read_initial(problem, other_seed.seed)({k: t for k, t in targets.items() if k not in moments})
        for target in moments.values():
            getattr(target, "to_local", lambda target=target: target)().zero_()

    engine.load_state_tensors(read)
    engine.load_state_values(other.state_values())
    got, want = train(engine, other_seed), train(other, other_seed)
    same = all((got["state"][key][3] == part[3]).all() for key, part in want["state"].items())
    return (
        same and got["held_out"] == want["held_out"] and [n for _, n in got["steps"]] == [n for _, n in want["steps"]]
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dp2_z3", FP32),
        ("ep2", BF16),
        *(pytest.param(name, FP32, marks=slow) for name in ("pp2", "tp2_ep2", "dp2_z2_offload", "dp2_z3_offload")),
        *(pytest.param(name, BF16, marks=slow) for name in ("dp2_z2", "dp2_z3")),
    ],
)
def test_an_engine_that_takes_state_goes_on_from_it(name, dtype):
    problem = _problem(dtype=dtype, steps=2)
    assert run_ranks(_refill, 2, _layout(problem, name), problem) == [True, True]


def _with_and_without(process: Process, layout: Layout, problem: Problem) -> bool:
    groups = join(process, layout)
    a = train(parallel_engine(problem, groups), problem)
    b = train(parallel_engine(problem, groups), problem, evaluations=2)
    return all((b["state"][key][3] == part[3]).all() for key, part in a["state"].items())


@pytest.mark.parametrize(
    "name", ["dp2_z3", *(pytest.param(name, marks=slow) for name in ("dp2", "pp2", "dp2_z2", "dp2_z2_offload"))]
)
def test_evaluation_changes_no_bit_of_training(name):
    problem = _problem(steps=2)
    assert run_ranks(_with_and_without, 2, _layout(problem, name), problem) == [True, True]
