import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.kernels.nvcc import Unavailable
from lfm.kernels.reservoir import (
    RecurrenceStats,
    cluster,
    make_reservoir,
    reservoir_recurrence,
)
from lfm.kernels.reservoir.chunked import (
    backward_sweep,
    forward_sweep,
    gain_statistics,
    graphed_backward_sweep,
    graphed_forward_sweep,
    weight_gradient,
)
from lfm.kernels.reservoir.grid import ChunkPlan
from lfm.kernels.reservoir.path import choose
from lfm.kernels.reservoir.reference import reservoir_recurrence_reference
from lfm.kernels.reservoir.self_test import require_agreement

LEAK_RATE = 0.3


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """In this mode torch.empty is filled with NaN, so an output that was never written fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    shape=(2, 40, 2, 12), *, seed=0, dtype=torch.float64, with_state=True, resets=(), radius=0.9, scale=1.0
):
    """drive, weight, state, reset; `resets` holds (sequence, position) pairs."""
    batch, num_positions, num_reservoirs, num_units = shape
    generator = torch.Generator().manual_seed(seed)
    drive = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    matrices = [make_reservoir(num_units, 0.3, radius, generator) for _ in range(num_reservoirs)]
    state = torch.randn(batch, num_reservoirs, num_units, generator=generator, dtype=torch.float64).tanh()
    reset = None
    if resets:
        reset = torch.zeros(batch, num_positions, dtype=torch.bool)
        for sequence, position in resets:
            reset[sequence, position] = True
    state_dtype = torch.promote_types(dtype, torch.float32)
    return drive.to(dtype), torch.stack(matrices).to(dtype), state.to(state_dtype) if with_state else None, reset


def outputs_and_grads(recurrence, inputs, **options):
    """Both outputs and every gradient by name, for a loss that weighs all of both outputs at random."""
    drive, weight, state, reset = inputs
    leaves = {"drive": drive, "weight": weight, "state": state}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    states, final = recurrence(
        leaves["drive"], leaves["weight"], leaves.get("state"), reset, leak_rate=LEAK_RATE, **options
    )
    generator = torch.Generator().manual_seed(99)
    # Rounded, so that every dtype has the same loss.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (states, final)]
    torch.autograd.backward([states, final], weights)
    return {"states": states, "final": final} | {f"grad {name}": x.grad for name, x in leaves.items()}


def relative_error(got, want):
    difference = (got.double() - want.double()).norm()
    return (difference / want.double().norm().clamp_min(1e-30)).item()


def assert_close(got, want, limit):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape
        error = relative_error(got[name], want[name])
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"


def assert_same_bits(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("with_state", [False, True], ids=["zero start", "given start"])
@pytest.mark.parametrize(
    "shape, resets",
    [
        ((1, 1, 1, 1), []),
        ((2, 1, 3, 5), [(0, 0)]),
        ((3, 2, 1, 7), [(1, 1)]),
        ((2, 37, 3, 13), []),
        ((2, 37, 3, 13), [(0, 0), (0, 5), (0, 6), (1, 36)]),
        ((1, 64, 1, 32), [(0, 31)]),
    ],
    ids=str,
)
def test_sequential_matches_reference(shape, resets, with_state):
    inputs = make_inputs(shape, resets=resets, with_state=with_state)
    want = outputs_and_grads(reservoir_recurrence_reference, inputs)
    assert_close(outputs_and_grads(reservoir_recurrence, inputs, backend="sequential"), want, 1e-12)


@pytest.mark.parametrize("backend", ["sequential", "chunked"])
def test_gradients_match_finite_differences(backend):
    drive, weight, state, reset = make_inputs((2, 7, 2, 3), resets=[(0, 3), (1, 0)])

    def recurrence(drive, weight, state):
        return reservoir_recurrence(
            drive,
            weight,
            state,
            reset,
            leak_rate=LEAK_RATE,
            backend=backend,
            chunk_length=2,
            warmup=6,  # over the whole sequence, so that the chunks too are exact
        )

    leaves = [x.requires_grad_() for x in (drive, weight, state) if x is not None]
    assert torch.autograd.gradcheck(recurrence, leaves)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_that_warm_up_over_everything_match_reference(data):
    num_positions = data.draw(st.integers(1, 40))
    chunk_length = data.draw(st.integers(1, 17))
    positions = st.tuples(st.integers(0, 1), st.integers(0, num_positions - 1))
    resets = data.draw(st.lists(positions, max_size=8))
    inputs = make_inputs((2, num_positions, 2, 6), resets=resets, with_state=data.draw(st.booleans()))
    stats = RecurrenceStats()
    options = {"backend": "chunked", "chunk_length": chunk_length, "warmup": num_positions, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, **options)
    assert_close(got, outputs_and_grads(reservoir_recurrence_reference, inputs), 1e-12)
    assert stats.repair_passes == stats.backward_repair_passes == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_of_any_warmup_agree_with_reference_to_the_tolerance(data):
    num_positions = data.draw(st.integers(1, 60))
    positions = st.tuples(st.integers(0, 1), st.integers(0, num_positions - 1))
    inputs = make_inputs((2, num_positions, 2, 6), resets=data.draw(st.lists(positions, max_size=8)))
    options = {
        "chunk_length": data.draw(st.integers(1, 20)),
        "warmup": data.draw(st.integers(0, 30)),
        "tolerance": 1e-9,
        "max_repair_passes": data.draw(st.integers(0, 4)),
    }
    got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
    assert_close(got, outputs_and_grads(reservoir_recurrence_reference, inputs), 1e-6)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("resets", [[], [(0, 64), (1, 50), (1, 199)]], ids=["one document", "documents"])
def test_a_usual_warmup_matches_reference(resets, dtype, limit):
    inputs = make_inputs((2, 200, 3, 32), resets=resets, dtype=dtype)
    exact = [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]
    stats = RecurrenceStats()
    options = {"backend": "chunked", "chunk_length": 32, "warmup": 128, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, **options)
    assert_close(got, outputs_and_grads(reservoir_recurrence_reference, exact), limit)
    assert got["states"].dtype == dtype and got["final"].dtype == dtype
    assert stats.forward_residual.shape == (3,) and stats.forward_residual.dtype == torch.float32
    assert stats.forward_residual.max() < limit
    assert stats.backward_residual is not None and stats.backward_residual.max() < limit


def test_the_residual_reports_a_short_warmup():
    inputs = make_inputs((2, 200, 3, 32))
    want = outputs_and_grads(reservoir_recurrence_reference, inputs)
    residuals = []
    for warmup in (0, 8, 16, 32):
        stats = RecurrenceStats()
        options = {"chunk_length": 25, "warmup": warmup, "tolerance": 1e9, "stats": stats}
        got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
        assert stats.repair_passes == stats.backward_repair_passes == 0
        assert not stats.fell_back and not stats.backward_fell_back

        error = (got["states"] - want["states"]).norm(dim=-1).amax(dim=(0, 1)) / want["states"].norm(dim=-1).mean()
        assert (stats.forward_residual > 0.7 * error).all()
        assert stats.backward_residual is not None
        residuals.append((stats.forward_residual.max().item(), stats.backward_residual.max().item()))
    assert residuals[0][0] > 0.5 and residuals[0][1] > 0.5
    assert all(later < earlier for pair in pairwise(residuals) for earlier, later in zip(*pair, strict=True))


def test_repair_passes_bring_both_directions_within_the_tolerance():
    inputs = make_inputs((2, 200, 2, 32), resets=[(1, 75), (1, 130)])
    want = outputs_and_grads(reservoir_recurrence_reference, inputs)
    stats = RecurrenceStats()
    options = {"chunk_length": 25, "warmup": 8, "tolerance": 1e-3, "max_repair_passes": 4, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
    assert stats.forward_residual.max() > 1e-3 and stats.backward_residual is not None
    assert stats.backward_residual.max() > 1e-3
    assert 1 <= stats.repair_passes <= 4 and not stats.fell_back
    assert 1 <= stats.backward_repair_passes <= 4 and not stats.backward_fell_back
    assert_close(got, want, 1e-3)


def test_repairing_every_chunk_is_exact():
    inputs = make_inputs((2, 50, 2, 12))
    stats = RecurrenceStats()
    options = {"chunk_length": 10, "warmup": 0, "tolerance": 0.0, "max_repair_passes": 4, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
    assert_close(got, outputs_and_grads(reservoir_recurrence_reference, inputs), 1e-12)
    assert stats.repair_passes == stats.backward_repair_passes == 4
    assert not stats.fell_back and not stats.backward_fell_back


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_the_fallback_is_the_sequential_path_and_says_so(dtype):
    inputs = make_inputs((2, 50, 2, 12), dtype=dtype, resets=[(0, 17)])
    stats = RecurrenceStats()
    options = {"chunk_length": 7, "warmup": 3, "tolerance": 0.0, "max_repair_passes": 1, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
    assert stats.fell_back and stats.backward_fell_back
    assert stats.repair_passes == stats.backward_repair_passes == 1
    assert stats.forward_residual.min() > 0
    assert_same_bits(got, outputs_and_grads(reservoir_recurrence, inputs, backend="sequential"))


def test_only_the_backward_falls_back_when_only_its_gradients_disagree():
    drive, weight, _, _ = make_inputs((1, 60, 1, 8))
    drive = torch.full_like(drive, 0.0).requires_grad_()  # states stay zero, so any forward warm-up is exact
    stats = RecurrenceStats()
    options = {"chunk_length": 10, "warmup": 2, "max_repair_passes": 0, "stats": stats}
    states, _ = reservoir_recurrence(drive, weight, None, None, leak_rate=LEAK_RATE, backend="chunked", **options)
    states.sum().backward()
    assert not stats.fell_back and stats.forward_residual.max() == 0
    assert stats.backward_fell_back


@pytest.mark.parametrize("warmup", [0, 4])
def test_boundaries_between_documents_do_not_count(warmup):
    resets = [(0, position) for position in range(10, 60, 10)]
    inputs = make_inputs((1, 60, 2, 8), resets=resets)
    stats = RecurrenceStats()
    options = {"chunk_length": 10, "warmup": warmup, "tolerance": 0.0, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", **options)
    assert_close(got, outputs_and_grads(reservoir_recurrence_reference, inputs), 1e-12)
    assert stats.forward_residual.max() == 0 and stats.repair_passes == 0
    assert stats.backward_residual is not None and stats.backward_residual.max() == 0


def test_gradients_below_the_range_of_fp32_squares_still_have_a_residual():
    drive, weight, _, _ = make_inputs((1, 60, 1, 8), dtype=torch.float32)
    stats = RecurrenceStats()
    options = {"chunk_length": 10, "warmup": 0, "max_repair_passes": 0, "stats": stats}
    states, _ = reservoir_recurrence(
        drive.requires_grad_(), weight, None, None, leak_rate=LEAK_RATE, backend="chunked", **options
    )
    (states.sum() * 1e-25).backward()
    assert stats.backward_fell_back
    assert stats.backward_residual is not None and 0.1 < stats.backward_residual.item() < 10


def test_a_residual_that_is_no_number_is_not_within_the_tolerance():
    drive, weight, _, _ = make_inputs((1, 60, 1, 8))
    drive[0, 31] = torch.nan
    stats = RecurrenceStats()
    options = {"chunk_length": 10, "warmup": 60, "tolerance": 1e9, "stats": stats}
    states, _ = reservoir_recurrence(drive, weight, None, None, leak_rate=LEAK_RATE, backend="chunked", **options)
    assert stats.fell_back and stats.forward_residual.isnan().all()
    assert not states[:, :31].isnan().any() and states[:, 31:].isnan().all()


@pytest.mark.parametrize("backend", ["sequential", "chunked"])
def test_bf16_stays_within_its_norms(backend):
    """Limits of norm ratio against float64 with the same bf16 W and drive; the worst position may be twice as far
    off.  Exchanged values are rounded to bf16, products accumulate in fp32, on every device."""
    drive, weight, _, reset = make_inputs((2, 400, 3, 96), dtype=torch.bfloat16, with_state=False, resets=[(0, 111)])
    stats = RecurrenceStats()
    got = outputs_and_grads(reservoir_recurrence, (drive, weight, None, reset), backend=backend, stats=stats)
    want = outputs_and_grads(reservoir_recurrence_reference, (drive.double(), weight.double(), None, reset))
    assert not stats.fell_back and not stats.backward_fell_back
    assert got["states"].dtype == torch.bfloat16 and got["final"].dtype == torch.float32
    for name, limit in {"states": 3e-3, "grad drive": 4e-3, "grad weight": 5e-3}.items():
        assert relative_error(got[name], want[name]) <= limit, name
    for name, limit in {"states": 6e-3, "grad drive": 8e-3}.items():
        worst = (got[name].double() - want[name]).norm(dim=-1).max() / want[name].norm(dim=-1).mean()
        assert worst <= limit, name


def test_bf16_multiplies_the_rounded_state_but_carries_the_exact_one():
    state = torch.full((1, 1, 4), 0.5 + 2**-12)  # 0.5 in bf16
    drive = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    _, final = reservoir_recurrence(drive, torch.eye(4)[None], state, None, leak_rate=LEAK_RATE)
    want = (1 - LEAK_RATE) * state + LEAK_RATE * torch.tensor(0.5).tanh()
    torch.testing.assert_close(final, want, rtol=0, atol=1e-6)


def test_fp32_weights_are_used_in_the_drives_precision_and_keep_their_own_gradient():
    drive, weight, state, reset = make_inputs((1, 20, 2, 8), dtype=torch.bfloat16)
    master = outputs_and_grads(reservoir_recurrence, (drive, weight.float(), state, reset))
    rounded = outputs_and_grads(reservoir_recurrence, (drive, weight, state, reset))
    assert master["grad weight"].dtype == torch.float32
    assert torch.equal(master["grad weight"].bfloat16(), rounded["grad weight"])
    assert torch.equal(master["states"], rounded["states"])


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 39), backend=st.sampled_from(["sequential", "chunked"]))
def test_the_whole_equals_the_halves_with_the_state_handed_on(cut, backend):
    drive, weight, state, reset = make_inputs((2, 40, 2, 6), resets=[(0, 13), (1, 30)])
    assert reset is not None
    options = {"leak_rate": LEAK_RATE, "backend": backend, "chunk_length": 8, "warmup": 40}
    whole, whole_final = reservoir_recurrence(drive, weight, state, reset, **options)
    first, between = reservoir_recurrence(drive[:, :cut], weight, state, reset[:, :cut], **options)
    second, final = reservoir_recurrence(drive[:, cut:], weight, between, reset[:, cut:], **options)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, whole_final, rtol=1e-12, atol=1e-12)


def test_packed_documents_do_not_see_each_other():
    drive, weight, _, _ = make_inputs((1, 60, 2, 8))
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, [0, 23]] = True
    options = {"leak_rate": LEAK_RATE, "backend": "chunked", "chunk_length": 10, "warmup": 7, "tolerance": 1e-9}
    packed, _ = reservoir_recurrence(drive, weight, None, reset, **options)
    alone, _ = reservoir_recurrence(drive[:, 23:], weight, None, None, leak_rate=LEAK_RATE, backend="sequential")
    torch.testing.assert_close(packed[:, 23:], alone, rtol=1e-8, atol=1e-8)


def test_auto_cuts_only_where_that_saves_steps():
    for num_positions, is_cut in [(1, False), (15, False), (16, True)]:
        drive, weight, state, reset = make_inputs((1, num_positions, 1, 8))
        stats = RecurrenceStats()
        options = {"chunk_length": 10, "warmup": 5, "tolerance": 1e9, "stats": stats}
        reservoir_recurrence(drive, weight, state, reset, leak_rate=LEAK_RATE, **options)
        assert (stats.forward_residual.max() > 0) == is_cut


def test_same_inputs_same_bits():
    inputs = make_inputs((2, 70, 2, 12), dtype=torch.bfloat16, resets=[(1, 20)])
    options = {"backend": "chunked", "chunk_length": 16, "warmup": 48}
    once = outputs_and_grads(reservoir_recurrence, inputs, **options)
    assert_same_bits(outputs_and_grads(reservoir_recurrence, inputs, **options), once)


def test_permuting_the_batch_permutes_the_states():
    drive, weight, state, reset = make_inputs((4, 50, 2, 8), resets=[(0, 9), (2, 40)])
    assert state is not None and reset is not None
    order = torch.tensor([2, 0, 3, 1])
    options = {"leak_rate": LEAK_RATE, "backend": "chunked", "chunk_length": 8, "warmup": 40}
    states, final = reservoir_recurrence(drive, weight, state, reset, **options)
    permuted, permuted_final = reservoir_recurrence(drive[order], weight, state[order], reset[order], **options)
    torch.testing.assert_close(permuted, states[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted_final, final[order], rtol=1e-12, atol=1e-12)


def test_the_stats_describe_the_gain():
    drive, weight, state, reset = make_inputs((2, 30, 2, 8), scale=2.0)
    stats = RecurrenceStats()
    states, _ = reservoir_recurrence(drive, weight, state, reset, leak_rate=LEAK_RATE, stats=stats)
    assert state is not None
    before = torch.cat([state[:, None], states[:, :-1]], dim=1)
    squashed = (states - (1 - LEAK_RATE) * before) / LEAK_RATE
    assert stats.saturation.item() == pytest.approx((squashed.abs() > 0.95).double().mean().item(), abs=2e-3)
    assert stats.mean_gain.item() == pytest.approx((1 - squashed**2).mean().item(), rel=1e-5)
    assert stats.backward_residual is None


def test_a_frozen_weight_gets_no_gradient():
    drive, weight, _, _ = make_inputs((1, 5, 1, 4))
    states, _ = reservoir_recurrence(drive.requires_grad_(), weight, None, None, leak_rate=LEAK_RATE)
    states.sum().backward()
    assert drive.grad is not None and weight.grad is None


def test_two_starts_converge():
    """Echo state property: the same drive makes a reservoir forget where it began."""
    drive, weight, state, _ = make_inputs((1, 300, 3, 64), radius=0.99)
    assert state is not None
    _, from_state = reservoir_recurrence(drive, weight, state, None, leak_rate=LEAK_RATE, backend="sequential")
    _, from_zero = reservoir_recurrence(drive, weight, None, None, leak_rate=LEAK_RATE, backend="sequential")
    assert relative_error(from_zero, from_state) < 1e-9


@pytest.mark.parametrize("num_units, connectivity", [(512, 0.1), (64, 0.1), (5, 0.1), (1, 0.5), (20, 1.0)])
def test_reservoirs_have_the_connectivity_and_radius_asked_for(num_units, connectivity):
    weight = make_reservoir(num_units, connectivity, 0.99, torch.Generator().manual_seed(3))
    assert weight.dtype == torch.float64 and weight.shape == (num_units, num_units)
    fan_in = (weight != 0).sum(dim=1)
    assert fan_in.max() - fan_in.min() <= 1 and fan_in.min() >= 1
    expected = max(connectivity, 1 / num_units)
    assert fan_in.double().mean().item() / num_units == pytest.approx(expected, rel=0.05)
    assert torch.linalg.eigvals(weight).abs().max().item() == pytest.approx(0.99, abs=1e-3)


def test_equal_draws_of_a_reservoir_fall_in_the_order_of_their_columns():
    generator = torch.Generator().manual_seed(4)
    draws = torch.rand(512, 512, generator=torch.Generator().manual_seed(4))
    assert (draws.sort(1).values.diff() == 0).any()
    order = np.argsort(draws.numpy(), axis=1, kind="stable")
    fan_in = np.diff(np.round(np.arange(513) * 0.3 * 512))
    connections = make_reservoir(512, 0.3, 0.9, generator) != 0
    assert (connections.numpy() == (order < fan_in[:, None])).all()


def test_reservoirs_follow_their_generator():
    draw = [make_reservoir(16, 0.2, 0.9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_tiny_reservoirs_are_redrawn_until_they_can_be_scaled():
    generator = torch.Generator().manual_seed(0)
    draws = [make_reservoir(3, 0.1, 0.9, generator) for _ in range(200)]
    assert max(weight.norm().item() for weight in draws) < 0.9 * 10 * 3**0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drive": torch.zeros(2, 4, 3)}, "drive has shape"),
        ({"weight": torch.zeros(2, 3, 4)}, "weight has shape"),
        ({"state": torch.zeros(2, 3)}, "state has shape"),
        ({"state": torch.zeros(1, 2, 3, dtype=torch.bfloat16)}, "at least float32"),
        ({"reset": torch.zeros(1, 4)}, "must be bool"),
        ({"leak_rate": 0.0}, "leak_rate"),
        ({"chunk_length": 0}, "chunk_length"),
        ({"chunk_length": "full"}, "chunk_length='full'"),
        ({"backend": "triton"}, "backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, message):
    arguments = {"drive": torch.zeros(1, 4, 2, 3), "weight": torch.zeros(2, 3, 3), "state": None, "reset": None}
    with pytest.raises(ValueError, match=message):
        reservoir_recurrence(**(arguments | {"leak_rate": LEAK_RATE} | change))


def chosen(device: str, dtype: torch.dtype, num_units: int, num_positions: int, *, with_backward: bool) -> str:
    drive = torch.zeros(1, num_positions, 1, num_units, dtype=dtype, device=device)
    return choose(drive, ChunkPlan(128, 64, 1e-2, 3), with_backward=with_backward).name


@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cpu_takes_the_plain_chunks(dtype, with_backward):
    assert chosen("cpu", dtype, 256, 300, with_backward=with_backward) == "chunked"


@pytest.mark.gpu
def test_a_gpu_without_a_kernel_of_the_size_takes_a_graph_for_training_alone():
    for dtype, num_units in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float64, 256)):
        assert chosen("cuda", dtype, num_units, 300, with_backward=True) == "graphed"
        assert chosen("cuda", dtype, num_units, 1, with_backward=True) == "chunked"
        assert chosen("cuda", dtype, num_units, 300, with_backward=False) == "chunked"
    drive = torch.zeros(1, 1025, 1, 64, device="cuda")
    plan = ChunkPlan(128, 64, 1e-2, 3).sequential(1025)
    assert choose(drive, plan, with_backward=True).name == "chunked"


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [True, False], ids=["chunked", "sequential"])
def test_a_replayed_graph_has_the_bits_of_the_launched_loop(cut):
    plan = ChunkPlan(chunk_length=32, warmup=64, tolerance=1e-2, max_repair_passes=3)
    plan = plan if cut else plan.sequential(300)
    for seed in range(3):  # the first captures, the others replay with other values
        drive, weight, _, reset = make_inputs((2, 300, 3, 64), seed=seed, dtype=torch.bfloat16, resets=[(0, 77 + seed)])
        drive, weight, reset = drive.cuda(), weight.cuda(), reset.cuda()
        states, gain, outcome = graphed_forward_sweep(drive, weight, None, reset, LEAK_RATE, plan)
        want = forward_sweep(drive, weight, None, reset, LEAK_RATE, plan, with_gain=True)
        assert torch.equal(states, want[0]) and torch.equal(gain, want[1])
        assert torch.equal(outcome.final, want[2].final) and torch.equal(outcome.residual, want[2].residual)
        grad_final = torch.zeros(2, 3, 64, device="cuda")
        args = (torch.randn_like(drive), grad_final, gain, weight, reset, LEAK_RATE, plan)
        delta, outcome = graphed_backward_sweep(*args)
        want = backward_sweep(*args)
        assert torch.equal(delta, want[0]) and torch.equal(outcome.final, want[1].final)


@pytest.mark.gpu
def test_a_replayed_graph_whose_residual_is_too_large_is_repaired():
    drive, weight, _, _ = make_inputs((1, 400, 2, 32), dtype=torch.float32, scale=0.01, radius=0.99)
    drive, weight = drive.cuda().requires_grad_(), weight.cuda()
    found = []
    for backend in ("chunked", "sequential"):
        stats = RecurrenceStats()
        states, _ = reservoir_recurrence(
            drive, weight, None, None, leak_rate=LEAK_RATE, backend=backend, chunk_length=64, warmup=4, stats=stats
        )
        found.append((states, stats))
    assert found[0][1].repair_passes > 0 or found[0][1].fell_back
    assert (found[0][0] - found[1][0]).norm() / found[1][0].norm() < 3e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "dtype, limit",
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize("backend", ["sequential", "chunked"])
def test_cuda_matches_the_cpu(backend, dtype, limit):
    inputs = make_inputs((2, 300, 3, 64), dtype=dtype, resets=[(0, 77), (1, 128)])
    options = {"backend": backend, "chunk_length": 64, "warmup": 192}
    want = outputs_and_grads(reservoir_recurrence, inputs, **options)
    got = outputs_and_grads(reservoir_recurrence, [None if x is None else x.cuda() for x in inputs], **options)
    assert_close({name: None if x is None else x.cpu() for name, x in got.items()}, want, limit)


# The steps of the chunked path as Triton kernels; without a GPU, through Triton's interpreter.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, HALF_LIMIT = (torch.bfloat16, 5e-3) if DEVICE == "cuda" else (torch.float16, 1e-3)
"""The interpreter multiplies no bf16."""


def both_sweeps(inputs, plan, backend):
    drive, weight, state, reset = inputs
    states, gain, forward = forward_sweep(drive, weight, state, reset, LEAK_RATE, plan, with_gain=True, backend=backend)
    assert gain is not None
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x) for x in (drive, state)]
    delta, backward = backward_sweep(*grads, gain, weight, reset, LEAK_RATE, plan, backend=backend)
    names = ("states", "gain", "final", "residual", "delta", "mu", "backward residual")
    found = (states, gain, forward.final, forward.residual, delta, backward.final, backward.residual)
    decided = [(x.repair_passes, x.fell_back) for x in (forward, backward)]
    return dict(zip(names, found, strict=True)), decided


@pytest.mark.parametrize(
    "dtype, limit, resets",
    [(torch.float32, 2e-6, [(0, 0), (0, 4), (1, 7)]), (HALF, HALF_LIMIT, [])],
    ids=["fp32, documents", "half, one document"],
)
@pytest.mark.parametrize(
    "plan",
    [
        ChunkPlan(chunk_length=4, warmup=9, tolerance=1.0, max_repair_passes=0),  # warms up past the start
        ChunkPlan(chunk_length=4, warmup=2, tolerance=1e-2, max_repair_passes=3),  # repairs
        ChunkPlan(chunk_length=4, warmup=0, tolerance=0.0, max_repair_passes=1),  # falls back
    ],
    ids=["accepted", "repaired", "fallen back"],
)
def test_a_fused_step_is_the_plain_one(plan, dtype, limit, resets):
    inputs = [x if x is None else x.to(DEVICE) for x in make_inputs((2, 11, 1, 7), dtype=dtype, resets=resets)]
    want, decided = both_sweeps(inputs, plan, "reference")
    got, decided_fused = both_sweeps(inputs, plan, "triton")
    assert decided_fused == decided and (plan.tolerance == 1.0 or decided[0][0] > 0)
    for name in want:
        if "residual" in name:  # a difference of roundings where chunks agree
            torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=10 * limit)
        else:
            assert relative_error(got[name], want[name]) <= limit, name


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (HALF, HALF_LIMIT)], ids=["fp32", "half"])
@pytest.mark.parametrize(
    "shape, chunk_length",
    [((1, 3, 2, 150), 3), ((5, 11, 2, 33), 3), ((75, 4, 1, 20), 2)],
    ids=["1 row", "20 rows", "150 rows"],
)
def test_a_fused_step_takes_sizes_that_no_tile_divides(shape, chunk_length, dtype, limit):
    resets = [(0, 2), (shape[0] - 1, 1)]
    inputs = [x if x is None else x.to(DEVICE) for x in make_inputs(shape, dtype=dtype, resets=resets)]
    plan = ChunkPlan(chunk_length, warmup=2, tolerance=math.inf, max_repair_passes=0)
    want, _ = both_sweeps(inputs, plan, "reference")
    got, _ = both_sweeps(inputs, plan, "triton")
    for name in ("states", "gain", "final", "delta", "mu"):
        assert relative_error(got[name], want[name]) <= limit, name


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.19, 0.21, 1.0, 30.0])
def test_the_tanh_of_a_fused_step_keeps_its_digits(scale):
    drive = torch.linspace(-scale, scale, 64, device=DEVICE).view(1, 1, 1, 64)
    states, gain, _ = forward_sweep(
        drive, torch.zeros(1, 64, 64, device=DEVICE), None, None, 1.0, ChunkPlan(1, 0, 0.0, 0),
        with_gain=True, backend="triton",
    )  # fmt: skip
    want = drive.double().tanh()
    torch.testing.assert_close(states.double(), want, rtol=1e-6, atol=0)
    assert gain is not None
    torch.testing.assert_close(gain.double(), 1 - want**2, rtol=0, atol=2e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_is_one_kernel():
    drive, weight, _, reset = (None if x is None else x.cuda() for x in make_inputs((1, 40, 3, 64), resets=[(0, 9)]))
    drive, weight = drive.bfloat16(), weight.bfloat16()
    plan = ChunkPlan(10, 30, 1e9, 0)
    _, gain, _ = forward_sweep(drive, weight, None, reset, LEAK_RATE, plan, with_gain=True)
    for sweep, args in [(forward_sweep, (drive, weight, None)), (backward_sweep, (drive, None, gain, weight))]:
        options = {"with_gain": True} if sweep is forward_sweep else {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            sweep(*args, reset, LEAK_RATE, plan, **options)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launched = Counter(event.name[:80] for event in profile.events() if event.device_type == on_device)
        # Deterministic mode fills whatever is allocated.
        launched = Counter({name: count for name, count in launched.items() if "FillFunctor" not in name})
        steps = Counter({name: launched.pop(name) for name in list(launched) if "_reservoir_" in name})
        assert steps.total() == 40, steps
        assert max(launched.values()) < 20, launched  # what surrounds the steps is not one a step


# What a kernel must pass before it is used.


def test_right_sweeps_pass_the_self_test():
    require_agreement(forward_sweep, backward_sweep, 48, torch.device("cpu"), torch.float32, 1e-5)


@pytest.mark.parametrize(
    "wrong, said", [(0, "its states of 48 units are off by 1.0e-03"), (2, "its final of 48 units")]
)
def test_wrong_sweeps_are_named_by_the_self_test(wrong, said):
    def forward(*args, **options):
        results = list(forward_sweep(*args, **options))
        if wrong == 2:
            results[2] = replace(results[2], final=results[2].final * 1.001)
        else:
            results[wrong] = results[wrong] * 1.001
        return tuple(results)

    with pytest.raises(Unavailable, match=said):
        require_agreement(forward, backward_sweep, 48, torch.device("cpu"), torch.float32, 1e-5)


# The cluster kernel.

needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
STATES_LIMIT, DELTA_LIMIT, WEIGHT_LIMIT = 3e-3, 4e-3, 5e-3  # of the norm; bf16 exchange leaves about half of each


def on_gpu(inputs):
    return [None if x is None else x.cuda() for x in inputs]


def kernel_inputs(batch, num_positions, num_reservoirs, *, num_units=512, **options):
    shape = (batch, num_positions, num_reservoirs, num_units)
    return on_gpu(make_inputs(shape, dtype=torch.bfloat16, **options))


def in_float64(inputs):
    return [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]


def assert_as_exact_as_bf16_is(inputs, **options):
    """States and all gradients against the float64 reference, whole and at the worst time step."""
    got = outputs_and_grads(reservoir_recurrence, inputs, **options)
    want = outputs_and_grads(reservoir_recurrence_reference, in_float64(inputs))
    limits = {"states": STATES_LIMIT, "grad drive": DELTA_LIMIT, "grad weight": WEIGHT_LIMIT}
    # One time step each, so held to the limit of a worst one.
    limits |= {"final": 2 * STATES_LIMIT, "grad state": 2 * DELTA_LIMIT}
    for name in want:
        error = relative_error(got[name], want[name])
        assert error <= limits[name], f"{name}: relative error {error:.2e} > {limits[name]:.0e}"
    for name in ("states", "grad drive"):
        worst = (got[name].double() - want[name]).norm(dim=-1).amax() / want[name].norm(dim=-1).mean()
        assert worst <= 2 * limits[name], f"{name}: worst time step {worst:.2e} > {2 * limits[name]:.0e}"


@pytest.mark.gpu
@needs_kernel
def test_a_cluster_kernel_is_chosen_in_both_dtypes():
    for with_backward in (True, False):
        assert chosen("cuda", torch.bfloat16, 512, 300, with_backward=with_backward) == "cluster"
        assert chosen("cuda", torch.float32, 128, 300, with_backward=with_backward) == "cluster_fp32"


@pytest.mark.gpu
@needs_kernel
def test_the_kernel_is_what_runs():
    drive, weight, _, _ = kernel_inputs(1, 4, 1, with_state=False)
    assert cluster.supports(drive)
    assert not cluster.supports(drive.float()) and not cluster.supports(drive[..., :64])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reservoir_recurrence(drive, weight, None, None, leak_rate=LEAK_RATE)
    assert any("reservoir_sweep" in event.key for event in profile.key_averages())


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("backend", ["sequential", "chunked"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("num_reservoirs", [1, 3])
@pytest.mark.parametrize("num_positions", [1, 300], ids=["one position", "300 positions"])
def test_the_kernel_matches_reference(num_positions, num_reservoirs, batch, backend):
    resets = [(0, 0)] if num_positions == 1 else [(0, 0), (0, 64), (batch - 1, 63), (batch - 1, 150), (0, 299)]
    inputs = kernel_inputs(batch, num_positions, num_reservoirs, resets=resets)
    assert_as_exact_as_bf16_is(inputs, backend=backend, chunk_length=64, warmup=96)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("num_units", cluster.NUM_UNITS)
@pytest.mark.parametrize("resets", [(), [(1, 100)]], ids=["one document", "documents"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zero start", "given start"])
def test_the_kernel_takes_any_start(with_state, resets, num_units):
    inputs = kernel_inputs(2, 200, 2, num_units=num_units, resets=resets, with_state=with_state)
    assert_as_exact_as_bf16_is(inputs, backend="chunked", chunk_length=50, warmup=80)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("chunk_length, warmup", [(7, 160), (100, 0), (400, 64), (1, 120)])
def test_the_kernel_takes_any_cut(chunk_length, warmup):
    inputs = kernel_inputs(2, 160, 1, resets=[(0, 31), (1, 33), (1, 100)])
    assert_as_exact_as_bf16_is(inputs, backend="chunked", chunk_length=chunk_length, warmup=warmup)


@pytest.mark.gpu
@needs_kernel
def test_the_kernels_short_warmup_is_repaired_in_both_directions():
    inputs = kernel_inputs(2, 300, 3, resets=[(1, 130)])
    stats = RecurrenceStats()
    options = {"backend": "chunked", "chunk_length": 64, "warmup": 4, "tolerance": 3e-3, "stats": stats}
    assert_as_exact_as_bf16_is(inputs, **options)
    assert stats.forward_residual.min() > 1e-2 and stats.backward_residual is not None
    assert stats.backward_residual.min() > 1e-2
    assert 1 <= stats.repair_passes <= 3 and not stats.fell_back
    assert 1 <= stats.backward_repair_passes <= 3 and not stats.backward_fell_back


@pytest.mark.gpu
@needs_kernel
def test_the_kernel_reports_the_residual_of_the_chunked_path():
    drive, weight, state, reset = kernel_inputs(2, 300, 3, resets=[(0, 64), (1, 130), (1, 236)])
    plan = ChunkPlan(chunk_length=64, warmup=8, tolerance=1e9, max_repair_passes=0)
    states, gain, statistics, outcome = cluster.forward_sweep(
        drive, weight, state, reset, LEAK_RATE, plan, with_gain=True, with_statistics=True
    )
    assert gain is not None and statistics is not None
    # To the last bit but for the order of a sum of 600,000: of this gain, not of one that differs by roundings.
    torch.testing.assert_close(statistics, gain_statistics(gain), rtol=1e-6, atol=0)
    want_states, want_gain, want = forward_sweep(drive, weight, state, reset, LEAK_RATE, plan, with_gain=True)
    assert relative_error(states, want_states) < STATES_LIMIT and relative_error(gain, want_gain) < STATES_LIMIT
    torch.testing.assert_close(outcome.residual, want.residual, rtol=2e-2, atol=0)
    grad_states = torch.randn_like(drive)
    args = (grad_states, torch.zeros_like(state), want_gain, weight, reset, LEAK_RATE, plan)
    delta, outcome = cluster.backward_sweep(*args)
    want_delta, want = backward_sweep(*args)
    assert relative_error(delta, want_delta) < DELTA_LIMIT
    assert want.residual.min() > 1e-2
    torch.testing.assert_close(outcome.residual, want.residual, rtol=2e-2, atol=0)


@pytest.mark.gpu
@needs_kernel
def test_chunks_that_never_agree_leave_the_kernels_exact_sweep():
    """Nilpotent, of norm 2: the spectral radius is 0, yet what enters one end matters for hundreds of steps."""
    drive, _, state, _ = kernel_inputs(1, 200, 1, scale=0.3)
    weight = torch.diag(torch.full((511,), 2.0), 1)[None].bfloat16().cuda()
    stats = RecurrenceStats()
    inputs = (drive, weight, state, None)
    options = {"backend": "chunked", "chunk_length": 16, "warmup": 32, "stats": stats}
    got = outputs_and_grads(reservoir_recurrence, inputs, **options)
    assert stats.fell_back and stats.repair_passes == 3
    assert stats.backward_fell_back and stats.backward_repair_passes == 3
    assert_same_bits(got, outputs_and_grads(reservoir_recurrence, inputs, backend="sequential"))
    want, _ = reservoir_recurrence_reference(drive.double(), weight.double(), state.double(), None, leak_rate=LEAK_RATE)
    assert relative_error(got["states"], want) < 1e-2


@pytest.mark.gpu
@needs_kernel
def test_the_kernels_results_are_the_same_bits_twice_and_in_any_batch():
    resets = [(5, 100), (2, 17)]
    drive, weight, state, reset = kernel_inputs(8, 1000, 3, resets=resets)
    options = {"backend": "chunked", "chunk_length": 32, "warmup": 64}  # 256 chunks: wider clusters than one row's

    def rows(rows):
        return outputs_and_grads(reservoir_recurrence, (drive[rows], weight, state[rows], reset[rows]), **options)

    whole = rows(slice(None))
    assert_same_bits(rows(slice(None)), whole)
    del whole["grad weight"]  # a sum over the batch
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (whole["states"], whole["final"])]
    for row in (0, 2, 5):
        one = [x[row : row + 1].clone() for x in (drive, state, reset)]
        leaves = [x.requires_grad_() for x in one[:2]]
        outputs = reservoir_recurrence(leaves[0], weight, leaves[1], one[2], leak_rate=LEAK_RATE, **options)
        grads = torch.autograd.grad(outputs, leaves, [x[row : row + 1] for x in weights])
        for name, x in zip(("states", "final", "grad drive", "grad state"), (*outputs, *grads), strict=True):
            assert torch.equal(x[0], whole[name][row]), f"{name} of row {row}"


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("num_units", cluster.NUM_UNITS)
def test_the_width_of_a_cluster_changes_no_bit(num_units, backward):
    drive, weight, state, reset = kernel_inputs(3, 500, 2, num_units=num_units, resets=[(0, 77), (2, 200)])
    gain = torch.rand_like(drive) if backward else None
    found = []
    for columns in cluster.STEP_COST:
        # 63 chunks and 2 reservoirs: neither fills the last cluster.  Repairs hand states from chunk to chunk.
        states, gain_output, final = torch.empty_like(drive), torch.empty_like(drive), torch.empty_like(state)
        residual, repairs = state.new_empty(2), torch.empty((), dtype=torch.int32, device="cuda")
        fell_back = torch.empty((), dtype=torch.bool, device="cuda")
        outputs = (states, None if backward else gain_output, final, residual, repairs, fell_back, None)
        cluster.solve(drive, gain, weight, state, reset, outputs, LEAK_RATE, 24, 8, 1e-3, 3, columns=columns)
        assert repairs >= 1 and not fell_back
        found.append((states, final, residual, repairs, states if backward else gain_output))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    assert not any(x.isnan().any() for x in found[0])


@pytest.mark.gpu
@needs_kernel
def test_the_kernel_is_right_in_many_waves():
    """More clusters than the device holds at once: 4 * 250 chunks of 3 reservoirs."""
    inputs = kernel_inputs(4, 2000, 3)
    assert_as_exact_as_bf16_is(inputs, backend="chunked", chunk_length=8, warmup=96)


@pytest.mark.gpu
@needs_kernel
def test_a_drive_that_is_no_number_stays_in_its_sequence_and_document():
    drive, weight, _, reset = kernel_inputs(2, 200, 1, resets=[(0, 120)], with_state=False)
    stats, options = RecurrenceStats(), {"leak_rate": LEAK_RATE, "chunk_length": 50}
    clean, _ = reservoir_recurrence(drive, weight, None, reset, backend="sequential", **options)
    drive[0, 60, 0, 3] = torch.nan
    states, _ = reservoir_recurrence(drive, weight, None, reset, backend="chunked", stats=stats, **options)
    assert stats.fell_back and stats.forward_residual.isnan().all()
    assert states[0, 61:120].isnan().all()
    for sequence, positions in [(1, slice(None)), (0, slice(60)), (0, slice(120, None))]:
        assert torch.equal(states[sequence, positions], clean[sequence, positions])


@pytest.mark.gpu
@needs_kernel
def test_the_kernel_can_be_captured_in_a_cuda_graph():
    drive, weight, _, reset = kernel_inputs(2, 300, 3, resets=[(1, 70)])
    given = drive.clone(), torch.randn_like(drive)

    def both_directions():
        cut = (LEAK_RATE, 64, 64, 1e-2, 3)
        forward = cluster.forward_op(given[0], weight, None, reset, *cut, True, True)
        return *forward, *cluster.backward_op(given[1], forward[1], weight, None, reset, *cut)

    both_directions()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_directions()
    for _ in range(2):
        for x in given:
            x.normal_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(x, y) for x, y in zip(replayed, both_directions(), strict=True))


@pytest.fixture
def waiting_is_an_error():
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def solve_all(drive, weight, state, reset, **options):
    """Outputs, gradients and stats of a loss that weighs all of both outputs alike, in a fixed order."""
    leaves = [x.detach().requires_grad_() for x in (drive, weight, state)]
    stats = RecurrenceStats()
    options |= {"leak_rate": LEAK_RATE, "backend": "chunked", "stats": stats}
    outputs = reservoir_recurrence(*leaves, reset, **options)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    return [*(x.detach() for x in outputs), *grads, *vars(stats).values()]


SHORT_WARMUP = {"chunk_length": 32, "warmup": 4}
ENDINGS = {
    "agreed": {"chunk_length": 32, "warmup": 96},
    "repaired": SHORT_WARMUP | {"tolerance": 3e-3},
    "fallen back": SHORT_WARMUP | {"tolerance": 1e-9, "max_repair_passes": 1},
}


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("options", ENDINGS.values(), ids=ENDINGS.keys())
def test_no_solve_waits_for_the_device(options, request):
    inputs = kernel_inputs(2, 300, 3, resets=[(1, 70)])
    want = solve_all(*inputs, **options)  # compiles, if nobody has
    request.getfixturevalue("waiting_is_an_error")
    got = solve_all(*inputs, **options)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
@needs_kernel
def test_a_graph_of_the_recurrence_repairs_what_its_inputs_need():
    """Captured once, replayed on drives whose chunks agree at once, after repairs, and never."""
    options = {"chunk_length": 50, "warmup": 32, "tolerance": 3e-3, "max_repair_passes": 2}
    drive, weight, state, reset = kernel_inputs(1, 300, 2, with_state=True)
    solve_all(drive, weight, state, reset, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve_all(drive, weight, state, reset, **options)
    endings = set()
    for scale in (3.0, 1.0, 0.3, 0.01, torch.nan, 3.0):
        drive.normal_().mul_(scale)
        graph.replay()
        want = solve_all(drive, weight, state, reset, **options)
        for got, right in zip(captured, want, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)
        endings.add((int(captured[8]), bool(captured[9])))  # repair passes, fell back
    assert (0, False) in endings and (2, True) in endings and len(endings) >= 3


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("options", ENDINGS.values(), ids=ENDINGS.keys())
def test_the_kernel_decides_as_the_chunked_path_does(options, monkeypatch):
    inputs = kernel_inputs(2, 300, 3, resets=[(1, 70), (0, 96)])
    got = solve_all(*inputs, **options)[5:]
    monkeypatch.setattr(cluster, "supports", lambda x: False)
    want = solve_all(*inputs, **options)[5:]
    names = list(vars(RecurrenceStats()))
    for name, x, y in zip(names, got, want, strict=True):
        assert x.device == y.device and x.dtype == y.dtype and x.shape == y.shape, name
        exact = name.endswith(("repair_passes", "fell_back"))
        # Roundings of bf16 differ; where the warm-up suffices the residual is nothing but them.
        floor = 2e-3 if name.endswith("residual") else 0.0
        torch.testing.assert_close(x, y, rtol=0 if exact else 2e-2, atol=0 if exact else floor, msg=name)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("batch", [1, 3])
def test_filling_the_device_is_as_exact_as_fixed_chunks(batch):
    inputs = kernel_inputs(batch, 2000, 3, resets=[(0, 700)])
    length = cluster.fill_chunk_length(inputs[0].shape, 96, inputs[0].device)
    resident = min(cluster.resident_clusters(0, backward, 8, 512) for backward in (False, True))
    assert batch * -(-2000 // length) <= resident // 3 * 16
    stats = RecurrenceStats()
    options = {"backend": "chunked", "chunk_length": "fill", "warmup": 96}
    assert_as_exact_as_bf16_is(inputs, **options, stats=stats)
    assert 0 < stats.forward_residual.max() < 1e-2 and not stats.fell_back
    assert_same_bits(
        outputs_and_grads(reservoir_recurrence, inputs, **options),
        outputs_and_grads(reservoir_recurrence, inputs, **(options | {"chunk_length": length})),
    )


def test_off_the_kernel_filling_means_128_steps():
    inputs = make_inputs((2, 300, 1, 8))
    filled = outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", chunk_length="fill")
    assert_same_bits(filled, outputs_and_grads(reservoir_recurrence, inputs, backend="chunked", chunk_length=128))


@pytest.mark.parametrize("resets", [[], [(0, 0), (2, 0), (1, 9)]], ids=["one document", "documents"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_weight_gradient_is_the_sum_over_positions(batch, resets):
    resets = [(sequence, position) for sequence, position in resets if sequence < batch]
    delta, _, state, reset = make_inputs((batch, 20, 2, 5), resets=resets)
    states = torch.randn_like(delta)
    before = torch.cat([state[:, None], states[:, :-1]], dim=1)
    if reset is not None:
        before = before.masked_fill(reset[:, :, None, None], 0)
    want = torch.einsum("btrn,btrm->rnm", delta, before)
    torch.testing.assert_close(weight_gradient(delta, states, state, reset), want, rtol=1e-12, atol=1e-12)


def test_what_a_call_saw_is_read_when_it_is_asked_for():
    """On the host, numbers that the repair loop decided on; the same fields and dtypes as on a device."""
    drive, weight, state, reset = make_inputs((1, 60, 1, 8))
    found = solve_all(drive, weight, state, reset, chunk_length=10, warmup=2, tolerance=1e-9, max_repair_passes=1)
    stats = dict(zip(vars(RecurrenceStats()), found[5:], strict=True))
    assert all(isinstance(x, torch.Tensor) for x in stats.values())
    assert stats["repair_passes"].dtype == torch.int32 and stats["backward_repair_passes"] == 1
    assert stats["fell_back"].dtype == torch.bool and stats["backward_fell_back"]


@pytest.mark.gpu
@needs_kernel
def test_the_operators_meet_the_rules_of_the_dispatcher():
    drive, weight, state, reset = kernel_inputs(1, 30, 1, resets=[(0, 4)])
    checks = ("test_schema", "test_faketensor")
    cut = (LEAK_RATE, 8, 8, 1e-2, 3)
    forward = (drive, weight, state, reset, *cut, True, True)
    torch.library.opcheck(cluster.forward_op, forward, test_utils=checks)
    backward = (drive, torch.rand_like(drive), weight, state, reset, *cut)
    torch.library.opcheck(cluster.backward_op, backward, test_utils=checks)


@pytest.mark.gpu
@needs_kernel
def test_without_a_compiler_the_chunked_path_is_taken_and_said_so(tmp_path, monkeypatch):
    inputs = kernel_inputs(1, 150, 1)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cluster.available.cache_clear()
    cluster.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=f"chunked path on cuda:0.*no nvcc under CUDA_HOME={tmp_path}"):
            assert not cluster.supports(inputs[0])
        assert not cluster.supports(inputs[0])  # and said so once
        assert_as_exact_as_bf16_is(inputs, backend="chunked", chunk_length=32, warmup=96)
    finally:
        cluster.available.cache_clear()
        cluster.library.cache_clear()


def test_a_cpu_takes_the_chunked_path_without_a_word(recwarn):
    assert not cluster.supports(torch.zeros(1, 4, 1, 512, dtype=torch.bfloat16))
    assert not recwarn.list


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernel_compiles_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cluster.library.cache_clear()
    try:
        assert cluster.library().reservoir_solve is not None
    finally:
        cluster.library.cache_clear()
