import functools
import math
import shutil

import pytest
import torch

from lfm.kernels.reservoir import RecurrenceStats, cluster_fp32, make_reservoir, reservoir_recurrence
from lfm.kernels.reservoir.chunked import backward_sweep, forward_sweep
from lfm.kernels.reservoir.grid import ChunkPlan
from lfm.kernels.reservoir.reference import reservoir_recurrence_reference

needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
SIZES = tuple(cluster_fp32.STEP_COST)
STATES_LIMIT, GRADIENT_LIMIT = 2e-6, 5e-6  # of the norm


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """In this mode torch.empty is filled with NaN, so an output that was never written fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def matrices(num_reservoirs, num_units):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([make_reservoir(num_units, 0.3, 0.9, generator) for _ in range(num_reservoirs)]).float()


def make_inputs(shape, *, with_state=True, resets=(), scale=1.0, device="cuda"):
    """drive, weight, state, reset; `resets` holds (sequence, position) pairs."""
    batch, num_positions, num_reservoirs, num_units = shape
    generator = torch.Generator().manual_seed(0)
    drive = torch.randn(shape, generator=generator) * scale
    state = torch.randn(batch, num_reservoirs, num_units, generator=generator).tanh() if with_state else None
    reset = None
    if resets:
        reset = torch.zeros(batch, num_positions, dtype=torch.bool)
        for sequence, position in resets:
            reset[sequence, position] = True
    return [None if x is None else x.to(device) for x in (drive, matrices(num_reservoirs, num_units), state, reset)]


def outputs_and_grads(recurrence, inputs, *, leak_rate=0.3, rows=slice(None), **options):
    """Both outputs and every gradient by name, for a loss that weighs all of both outputs at random.  `rows` are
    those of the batch to run, with the weights that they have in the whole."""
    drive, weight, state, reset = inputs
    generator = torch.Generator().manual_seed(99)
    shapes = (drive.shape, (len(drive), *drive.shape[2:]))
    weights = [torch.randn(shape, generator=generator).to(drive)[rows] for shape in shapes]
    leaves = {"drive": drive[rows], "weight": weight, "state": None if state is None else state[rows]}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    reset = None if reset is None else reset[rows].clone()
    outputs = recurrence(leaves["drive"], leaves["weight"], leaves.get("state"), reset, leak_rate=leak_rate, **options)
    torch.autograd.backward(outputs, weights)
    return dict(zip(("states", "final"), outputs, strict=True)) | {f"grad {n}": x.grad for n, x in leaves.items()}


def relative_error(got, want):
    difference = (got.double() - want.double()).norm()
    return (difference / want.double().norm().clamp_min(1e-30)).item()


def in_float64(inputs):
    return [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]


def assert_exact_to_fp32(inputs, *, leak_rate=0.3, **options):
    """States and all gradients against the float64 reference, whole and at the worst time step."""
    got = outputs_and_grads(reservoir_recurrence, inputs, leak_rate=leak_rate, **options)
    want = outputs_and_grads(reservoir_recurrence_reference, in_float64(inputs), leak_rate=leak_rate)
    limits = dict.fromkeys(want, GRADIENT_LIMIT) | {"states": STATES_LIMIT, "final": STATES_LIMIT}
    for name in want:
        error = relative_error(got[name], want[name])
        assert error <= limits[name], f"{name}: relative error {error:.2e} > {limits[name]:.0e}"
    for name in ("states", "grad drive"):
        worst = (got[name].double() - want[name]).norm(dim=-1).amax() / want[name].norm(dim=-1).mean()
        assert worst <= 2 * limits[name], f"{name}: worst time step {worst:.2e} > {2 * limits[name]:.0e}"


def assert_same_bits(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.gpu
@needs_kernel
def test_the_fp32_kernel_is_what_runs():
    drive, weight, _, _ = make_inputs((1, 4, 1, 256), with_state=False)
    assert cluster_fp32.supports(drive)
    for other in (drive.bfloat16(), drive.double(), drive[..., :64], drive.repeat(1, 1, 1, 4)):
        assert not cluster_fp32.supports(other)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reservoir_recurrence(drive, weight, None, None, leak_rate=1.0)
    assert any("reservoir_sweep_fp32" in event.key for event in profile.key_averages())


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("leak_rate", [0.3, 1.0])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("num_reservoirs", [1, 3])
@pytest.mark.parametrize("num_units", SIZES)
def test_the_fp32_kernel_matches_reference(num_units, num_reservoirs, batch, leak_rate):
    resets = [(0, 0), (0, 50), (batch - 1, 49), (batch - 1, 98)]
    inputs = make_inputs((batch, 99, num_reservoirs, num_units), resets=resets)
    assert_exact_to_fp32(inputs, leak_rate=leak_rate, backend="sequential")


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("leak_rate", [0.3, 1.0])
@pytest.mark.parametrize("num_units", SIZES)
def test_the_fp32_kernel_is_as_exact_as_the_plain_path(num_units, leak_rate):
    drive, weight, state, _ = inputs = make_inputs((8, 200, 1, num_units))
    grad_states = torch.randn_like(drive)
    plan = ChunkPlan(200, 0, math.inf, 0)
    errors = []
    double_drive, double_weight, double_state, _ = in_float64(inputs)
    exact = forward_sweep(double_drive, double_weight, double_state, None, leak_rate, plan, with_gain=True)
    exact_delta, _ = backward_sweep(
        grad_states.double(), torch.zeros_like(double_state), exact[1], double_weight, None, leak_rate, plan
    )
    for forward, backward in (
        (cluster_fp32.forward_sweep, cluster_fp32.backward_sweep),
        (forward_sweep, backward_sweep),
    ):
        states, gain, _ = forward(drive, weight, state, None, leak_rate, plan, with_gain=True)
        delta, _ = backward(grad_states, torch.zeros_like(state), gain, weight, None, leak_rate, plan)
        pairs = ((states, exact[0]), (gain, exact[1]), (delta, exact_delta))
        errors.append([relative_error(got, want) for got, want in pairs])
    for kernel, plain in zip(*errors, strict=True):
        assert kernel <= 2 * plain


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("num_units", SIZES)
@pytest.mark.parametrize("resets", [(), [(1, 100)]], ids=["one document", "documents"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zero start", "given start"])
def test_the_fp32_kernel_takes_any_start(with_state, resets, num_units):
    inputs = make_inputs((2, 161, 2, num_units), resets=resets, with_state=with_state)
    assert_exact_to_fp32(inputs, backend="chunked", chunk_length=50, warmup=161)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("num_units", SIZES)
@pytest.mark.parametrize("num_positions, chunk_length", [(160, 7), (160, 100), (160, 400), (33, 1), (1, 1), (2, 2)])
def test_the_fp32_kernel_takes_any_cut(num_positions, chunk_length, num_units):
    resets = [(0, 31), (1, 0)] if num_positions > 31 else [(1, 0)]
    inputs = make_inputs((2, num_positions, 1, num_units), resets=resets)
    # A warm-up over the whole sequence leaves nothing to forget.
    assert_exact_to_fp32(inputs, backend="chunked", chunk_length=chunk_length, warmup=num_positions)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("num_units", SIZES)
def test_the_fp32_kernels_short_warmup_is_repaired_in_both_directions(num_units):
    inputs = make_inputs((2, 300, 3, num_units), resets=[(1, 130)])
    stats = RecurrenceStats()
    options = {"backend": "chunked", "chunk_length": 64, "warmup": 4, "tolerance": 3e-7, "max_repair_passes": 4}
    assert_exact_to_fp32(inputs, stats=stats, **options)
    assert stats.forward_residual.min() > 1e-2 and stats.backward_residual is not None
    assert stats.backward_residual.min() > 1e-2
    assert 1 <= int(stats.repair_passes) <= 4 and not stats.fell_back
    assert 1 <= int(stats.backward_repair_passes) <= 4 and not stats.backward_fell_back


@pytest.mark.gpu
@needs_kernel
def test_the_fp32_kernel_reports_the_residual_of_the_chunked_path():
    drive, weight, state, reset = make_inputs((2, 300, 3, 256), resets=[(0, 64), (1, 130), (1, 236)])
    plan = ChunkPlan(chunk_length=64, warmup=8, tolerance=1e9, max_repair_passes=0)
    states, gain, outcome = cluster_fp32.forward_sweep(drive, weight, state, reset, 0.3, plan, with_gain=True)
    want_states, want_gain, want = forward_sweep(drive, weight, state, reset, 0.3, plan, with_gain=True)
    assert relative_error(states, want_states) < STATES_LIMIT and relative_error(gain, want_gain) < STATES_LIMIT
    assert want.residual.min() > 1e-2
    torch.testing.assert_close(outcome.residual, want.residual, rtol=1e-4, atol=0)
    args = (torch.randn_like(drive), torch.zeros_like(state), want_gain, weight, reset, 0.3, plan)
    delta, outcome = cluster_fp32.backward_sweep(*args)
    want_delta, want = backward_sweep(*args)
    assert relative_error(delta, want_delta) < GRADIENT_LIMIT
    assert want.residual.min() > 1e-2
    torch.testing.assert_close(outcome.residual, want.residual, rtol=1e-4, atol=0)


@pytest.mark.gpu
@needs_kernel
def test_chunks_that_never_agree_leave_the_fp32_kernels_exact_sweep():
    """Nilpotent, of norm 2: the spectral radius is 0, yet what enters one end matters for hundreds of steps."""
    drive, _, state, _ = make_inputs((1, 200, 1, 256), scale=0.3)
    inputs = (drive, torch.diag(torch.full((255,), 2.0), 1)[None].cuda(), state, None)
    stats = RecurrenceStats()
    got = outputs_and_grads(
        reservoir_recurrence, inputs, backend="chunked", chunk_length=16, warmup=32, max_repair_passes=1, stats=stats
    )
    assert stats.fell_back and stats.backward_fell_back
    assert_same_bits(got, outputs_and_grads(reservoir_recurrence, inputs, backend="sequential"))


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("num_units", SIZES)
def test_the_fp32_kernels_results_are_the_same_bits_twice_and_in_any_batch(num_units):
    inputs = make_inputs((64, 90, 3, num_units), resets=[(5, 50), (2, 17)])
    options = {"backend": "chunked", "chunk_length": 32, "warmup": 8, "max_repair_passes": 0, "tolerance": math.inf}
    whole = outputs_and_grads(reservoir_recurrence, inputs, **options)
    assert_same_bits(outputs_and_grads(reservoir_recurrence, inputs, **options), whole)
    for row in (0, 2, 5):
        one = outputs_and_grads(reservoir_recurrence, inputs, rows=slice(row, row + 1), **options)
        for name in ("states", "final", "grad drive", "grad state"):
            assert torch.equal(one[name][0], whole[name][row]), f"{name} of row {row}"


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("num_units", SIZES)
def test_the_width_of_an_fp32_cluster_changes_no_bit(num_units, backward):
    drive, weight, state, reset = make_inputs((3, 500, 2, num_units), resets=[(0, 77), (2, 200)])
    gain = torch.rand_like(drive) if backward else None
    plan = ChunkPlan(24, 32, math.inf, 0)
    found = []
    for columns in cluster_fp32.STEP_COST[num_units]:
        # 63 chunks: they do not fill the last cluster
        outputs = torch.empty_like(drive), None if backward else torch.empty_like(drive)
        given = (drive, gain, weight, *outputs, state, None, reset, 0.3, plan)
        found.append((*cluster_fp32.launch(*given, columns=columns), *filter(torch.is_tensor, outputs)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    assert not any(x.isnan().any() for x in found[0])


@pytest.mark.gpu
@needs_kernel
def test_the_fp32_kernel_is_right_in_many_waves():
    """More clusters than the device holds at once: 2 * 500 chunks of 3 reservoirs."""
    inputs = make_inputs((2, 1000, 3, 256))
    assert_exact_to_fp32(inputs, backend="chunked", chunk_length=2, warmup=1000)


@pytest.mark.gpu
@needs_kernel
def test_an_fp32_drive_that_is_no_number_stays_in_its_sequence_and_document():
    drive, weight, _, reset = make_inputs((2, 200, 1, 256), resets=[(0, 120)], with_state=False)
    stats, options = RecurrenceStats(), {"leak_rate": 0.3, "chunk_length": 50}
    clean, _ = reservoir_recurrence(drive, weight, None, reset, backend="sequential", **options)
    drive[0, 60, 0, 3] = torch.nan
    states, _ = reservoir_recurrence(drive, weight, None, reset, backend="chunked", stats=stats, **options)
    assert stats.fell_back and stats.forward_residual.isnan().all()
    assert states[0, 61:120].isnan().all()
    for sequence, positions in [(1, slice(None)), (0, slice(60)), (0, slice(120, None))]:
        assert torch.equal(states[sequence, positions], clean[sequence, positions])


@pytest.mark.gpu
@needs_kernel
def test_a_sequential_fp32_sweep_never_waits_for_the_device():
    drive, weight, state, reset = make_inputs((4, 60, 1, 256), resets=[(1, 7)])
    drive.requires_grad_()
    cluster_fp32.supports(drive)  # compiles and tests itself
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        states, _ = reservoir_recurrence(drive, weight, state, reset, leak_rate=1.0, backend="sequential")
        states.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_kernel
def test_the_fp32_kernel_can_be_captured_in_a_cuda_graph():
    drive, weight, _, reset = make_inputs((2, 300, 3, 256), resets=[(1, 70)], with_state=False)
    given, plan = (drive.clone(), torch.randn_like(drive)), ChunkPlan(64, 64, math.inf, 0)

    def both_directions():
        states, gain, forward = cluster_fp32.forward_sweep(given[0], weight, None, reset, 0.3, plan, with_gain=True)
        delta, backward = cluster_fp32.backward_sweep(given[1], None, gain, weight, reset, 0.3, plan)
        return states, gain, forward.final, delta, backward.final

    assert cluster_fp32.supports(drive)
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


@pytest.mark.gpu
@needs_kernel
def test_without_a_compiler_the_plain_fp32_path_is_taken_and_said_so(tmp_path, monkeypatch):
    inputs = make_inputs((1, 50, 1, 256))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cluster_fp32.available.cache_clear()
    cluster_fp32.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=f"chunked path on cuda:0.*no nvcc under CUDA_HOME={tmp_path}"):
            assert not cluster_fp32.supports(inputs[0])
        assert not cluster_fp32.supports(inputs[0])  # and said so once
        assert_exact_to_fp32(inputs, backend="sequential")
    finally:
        cluster_fp32.available.cache_clear()
        cluster_fp32.library.cache_clear()


@pytest.mark.parametrize("num_units", SIZES)
def test_a_cpu_takes_the_plain_fp32_path_without_a_word(num_units, recwarn):
    drive, weight, state, reset = make_inputs((2, 9, 1, num_units), resets=[(1, 4)], device="cpu")
    assert not cluster_fp32.supports(drive)
    states, _ = reservoir_recurrence(drive, weight, state, reset, leak_rate=1.0)
    want, _ = reservoir_recurrence_reference(drive.double(), weight.double(), state.double(), reset, leak_rate=1.0)
    assert relative_error(states, want) < STATES_LIMIT
    assert not recwarn.list


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_fp32_kernel_compiles_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cluster_fp32.library.cache_clear()
    try:
        assert cluster_fp32.library().reservoir_sweep_launch is not None
    finally:
        cluster_fp32.library.cache_clear()
