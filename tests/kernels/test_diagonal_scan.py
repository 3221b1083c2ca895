import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.kernels.diagonal_scan import cuda, diagonal_scan
from lfm.kernels.diagonal_scan.op import disagreement, first_that_agrees, module_of
from lfm.kernels.diagonal_scan.reference import diagonal_scan_reference
from lfm.kernels.nvcc import Unavailable
from tests.comparison import assert_close, relative_error

kernel = pytest.importorskip("lfm.kernels.diagonal_scan.kernel", reason="needs triton")
DELTA_MIN = 1e-5


def preactivation(delta):
    """x with softplus(x) = delta, in float64."""
    return delta + torch.log(-torch.expm1(-delta))


def make_inputs(shape=(2, 40, 5), *, seed=0, dtype=torch.float64, with_state=True, resets=(), rates=(-5.0, 0.5)):
    """gate, bias, value, state, reset; softplus(gate + bias) is log-uniform between powers of ten.

    gate and value are slices of one tensor; resets are (sequence, position) pairs.
    """
    batch, num_positions, num_channels = shape
    generator = torch.Generator().manual_seed(seed)
    low, high = rates
    delta = 10 ** (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64))
    bias = torch.randn(num_channels, generator=generator, dtype=torch.float64)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    projected = torch.cat((value, preactivation(delta) - bias, value), dim=-1).to(dtype)
    state = torch.randn(batch, num_channels, generator=generator, dtype=torch.float64).tanh()
    reset = None
    if resets:
        reset = torch.zeros(batch, num_positions, dtype=torch.bool)
        for sequence, position in resets:
            reset[sequence, position] = True
    wide = torch.promote_types(dtype, torch.float32)
    value, gate, _ = projected.chunk(3, dim=-1)
    return gate, bias.to(wide), value, state.to(wide) if with_state else None, reset


def in_float64(inputs):
    return tuple(x.double() if x is not None and x.is_floating_point() else x for x in inputs)


def upstream(h, final):
    """Random gradients of both outputs, the same for all paths."""
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (h, final)]


def outputs_and_grads(scan, inputs, *, delta_min=DELTA_MIN, **options):
    """Both outputs and every gradient by name, for a loss that weighs all of both outputs at random."""
    gate, bias, value, state, reset = inputs
    leaves = {"gate": gate, "bias": bias, "value": value, "state": state}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
    arguments = (leaves["gate"], leaves["bias"], leaves["value"], leaves.get("state"), reset)
    h, final = scan(*arguments, delta_min=delta_min, **options)
    torch.autograd.backward([h, final], upstream(h, final))
    return {"h": h.detach(), "final": final.detach()} | {f"grad {name}": x.grad for name, x in leaves.items()}


def kernel_outputs_and_grads(inputs, forward_tiling=None, backward_tiling=None, *, path="triton"):
    """The same, straight from the kernels, with a given tiling of Triton's."""
    forward, backward = [], []
    if path == "triton":
        forward, backward = [forward_tiling], [backward_tiling]
    h, final = module_of(path).forward(*inputs, DELTA_MIN, *forward)
    grads = module_of(path).backward(*inputs, h, *upstream(h, final), DELTA_MIN, *backward)
    found = {"h": h, "final": final} | dict(
        zip(("grad gate", "grad bias", "grad value", "grad state"), grads, strict=True)
    )
    return {name: x for name, x in found.items() if name != "grad state" or inputs[3] is not None}


@pytest.mark.parametrize("with_state", [False, True], ids=["zero start", "given start"])
@pytest.mark.parametrize(
    "shape, resets",
    [
        ((1, 1, 1), []),
        ((2, 1, 3), [(0, 0)]),
        ((3, 2, 7), [(1, 1)]),
        ((2, 3, 1), []),
        ((2, 64, 5), []),
        ((2, 65, 5), [(0, 0), (0, 5), (0, 6), (1, 64)]),
        ((1, 300, 4), [(0, 31)]),
    ],
    ids=str,
)
def test_values_and_every_gradient_equal_the_reference(shape, resets, with_state):
    inputs = make_inputs(shape, resets=resets, with_state=with_state)
    assert_close(outputs_and_grads(diagonal_scan, inputs), outputs_and_grads(diagonal_scan_reference, inputs), 1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_length_any_resets_and_any_decay_equal_the_reference(data):
    num_positions = data.draw(st.integers(1, 50))
    resets = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, num_positions - 1)), max_size=8))
    rates = sorted(data.draw(st.tuples(st.floats(-12, 0.5), st.floats(-12, 0.5))))
    delta_min = data.draw(st.sampled_from([0.0, 1e-5, 0.1]))
    inputs = make_inputs((2, num_positions, 3), resets=resets, rates=rates, with_state=data.draw(st.booleans()))
    got, want = (
        outputs_and_grads(scan, inputs, delta_min=delta_min) for scan in (diagonal_scan, diagonal_scan_reference)
    )
    assert_close(got, want, 1e-11)


def test_gradients_match_finite_differences():
    gate, bias, value, state, reset = make_inputs((2, 7, 3), resets=[(0, 3), (1, 0)], rates=(-1.0, 0.5))
    leaves = [x.clone().requires_grad_() for x in (gate, bias, value, state) if x is not None]
    assert torch.autograd.gradcheck(lambda *leaves: diagonal_scan(*leaves, reset, delta_min=0.01), leaves)


def test_the_operators_meet_torchs_contract():
    """Shapes for tracing, no aliasing, no writes to inputs, gradients under compilation."""
    gate, bias, value, state, reset = make_inputs((2, 5, 3), dtype=torch.bfloat16, resets=[(0, 2)])
    leaves = [x.clone().requires_grad_() for x in (gate, bias, value, state) if x is not None]
    torch.library.opcheck(torch.ops.lfm.diagonal_scan.default, (*leaves, reset, 1e-5, "chunked"))
    h, final = diagonal_scan(*leaves, reset, delta_min=1e-5)
    arguments = (gate, bias, value, state, reset, h.detach(), *upstream(h.detach(), final.detach()), 1e-5, "chunked")
    torch.library.opcheck(torch.ops.lfm.diagonal_scan_backward.default, arguments)


@pytest.mark.parametrize("x", [-torch.inf, -27.0, -4.6, 5.0, 88.0, 1e4, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_products_of_decays_that_underflow_or_stay_one_are_exact_to_rounding(x, dtype):
    """Both round at each of 300 positions, by up to half a unit in the last place each time."""
    _, _, value, _, _ = make_inputs((1, 300, 3), dtype=dtype)
    gate, bias = torch.full_like(value, x), torch.zeros(3, dtype=dtype)
    gate[:, ::7] = -6.9
    got, _ = diagonal_scan(gate, bias, value, None, None, delta_min=0.0)
    want, _ = diagonal_scan_reference(gate, bias, value, None, None, delta_min=0.0)
    assert relative_error(got, want) < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("x", [-20.0, 0.5, 30.0, 80.0])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
def test_the_gradient_of_any_decay_has_all_its_digits(x, dtype, bound):
    _, bias, value, state, _ = make_inputs((2, 1, 4), dtype=dtype)
    gate = torch.full_like(value, x).requires_grad_()
    assert state is not None
    diagonal_scan(gate, 0 * bias, value, state, None, delta_min=0.0)[0].sum().backward()
    s = torch.tensor(x, dtype=torch.float64)
    want = torch.sigmoid(s) * torch.sigmoid(-s) * (value.double().tanh() - state[:, None].double())
    # exp itself is good to `x` units in the last place of its argument.
    assert gate.grad is not None and relative_error(gate.grad, want) < bound * max(1, abs(x))


def test_no_decay_keeps_the_state_and_full_decay_takes_the_value():
    _, bias, value, state, _ = make_inputs((2, 30, 4))
    assert state is not None
    kept, _ = diagonal_scan(torch.full_like(value, -torch.inf), bias, value, state, None, delta_min=0.0)
    assert torch.equal(kept, state[:, None].expand_as(kept))
    taken, _ = diagonal_scan(torch.full_like(value, torch.inf), bias, value, state, None, delta_min=0.0)
    assert torch.equal(taken, value.tanh())


def test_no_gate_forgets_slower_than_the_floor():
    gate = torch.full((1, 1000, 1), -40.0, dtype=torch.float64)
    _, final = diagonal_scan(gate, torch.zeros(1).double(), 0 * gate, torch.ones(1, 1).double(), None, delta_min=1e-3)
    assert abs(final.item() - math.exp(-1)) < 1e-12


def test_a_slow_channel_gains_what_it_loses_in_fp32():
    """With the gain formed as 1 - exp(-delta) in fp32 it would be 19 % too large here."""
    gate = torch.full((1, 4096, 1), float(preactivation(torch.tensor(1e-7, dtype=torch.float64))))
    _, final = diagonal_scan(gate, torch.zeros(1), torch.full_like(gate, 50.0), None, None, delta_min=0.0)
    exact = -torch.expm1(torch.tensor(-4096e-7, dtype=torch.float64))
    assert abs(final.double() / exact - 1).item() < 1e-3


def test_states_are_means_of_the_values_and_never_exceed_them():
    h, _ = diagonal_scan(*make_inputs((4, 500, 8), dtype=torch.float32), delta_min=DELTA_MIN)
    assert h.abs().max() <= 1


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_narrow_inputs_stay_within_their_rounding(dtype, bound):
    inputs = make_inputs((2, 400, 16), dtype=dtype, resets=[(0, 111)])
    got = outputs_and_grads(diagonal_scan, inputs)
    assert got["h"].dtype == got["grad value"].dtype == got["grad gate"].dtype == dtype
    assert got["final"].dtype == got["grad bias"].dtype == torch.float32
    assert_close(got, outputs_and_grads(diagonal_scan_reference, in_float64(inputs)), bound)


def test_fp32_gates_with_bf16_values_keep_their_own_gradient():
    gate, bias, value, state, reset = make_inputs((1, 50, 4), dtype=torch.float32)
    inputs = (gate, bias, value.bfloat16(), state, reset)
    got = outputs_and_grads(diagonal_scan, inputs)
    want = outputs_and_grads(diagonal_scan_reference, in_float64(inputs))
    assert got["grad gate"].dtype == torch.float32 and got["grad value"].dtype == torch.bfloat16
    assert_close(got, want, 6e-3)
    assert relative_error(got["final"], want["final"]) < 1e-6


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 39))
def test_the_whole_equals_the_halves_with_the_state_handed_on(cut):
    gate, bias, value, state, reset = make_inputs((2, 40, 6), resets=[(0, 13), (1, 30)])
    assert reset is not None
    whole, whole_final = diagonal_scan(gate, bias, value, state, reset, delta_min=DELTA_MIN)
    first, between = diagonal_scan(gate[:, :cut], bias, value[:, :cut], state, reset[:, :cut], delta_min=DELTA_MIN)
    second, final = diagonal_scan(gate[:, cut:], bias, value[:, cut:], between, reset[:, cut:], delta_min=DELTA_MIN)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, whole_final, rtol=1e-12, atol=1e-12)


def test_nothing_crosses_a_reset():
    gate, bias, value, state, reset = make_inputs((1, 60, 4), resets=[(0, 23)])
    value = value.clone().requires_grad_()
    h, _ = diagonal_scan(gate, bias, value, state, reset, delta_min=DELTA_MIN)
    alone, _ = diagonal_scan(gate[:, 23:], bias, value[:, 23:], None, None, delta_min=DELTA_MIN)
    torch.testing.assert_close(h[:, 23:], alone, rtol=1e-12, atol=1e-12)
    h[:, 23:].sum().backward()
    assert value.grad is not None and (value.grad[:, :23] == 0).all() and (value.grad[:, 23:] != 0).all()


def test_a_row_has_the_same_bits_in_any_batch():
    gate, bias, value, state, reset = make_inputs((4, 50, 8), dtype=torch.float32, resets=[(0, 9), (2, 40)])
    assert state is not None and reset is not None
    order = torch.tensor([2, 0, 3])
    h, final = diagonal_scan(gate, bias, value, state, reset, delta_min=DELTA_MIN)
    permuted = diagonal_scan(gate[order], bias, value[order], state[order], reset[order], delta_min=DELTA_MIN)
    assert torch.equal(permuted[0], h[order]) and torch.equal(permuted[1], final[order])


def test_inputs_are_not_written_to():
    inputs = make_inputs((2, 16, 4), resets=[(0, 3)])
    copies = [x.clone() for x in inputs if x is not None]
    outputs_and_grads(diagonal_scan, inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": torch.zeros(4, 3)}, "value has shape"),
        ({"gate": torch.zeros(1, 4, 2)}, "gate has shape"),
        ({"gate": torch.zeros(1, 4, 3, dtype=torch.int64)}, "gate is torch.int64"),
        ({"bias": torch.zeros(1, 3)}, "bias has shape"),
        ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, "bias is torch.bfloat16; it must be at least float32"),
        ({"state": torch.zeros(3)}, "state has shape"),
        ({"state": torch.zeros(1, 3, dtype=torch.bfloat16)}, "state is torch.bfloat16; it must be at least float32"),
        ({"reset": torch.zeros(1, 4)}, "must be bool"),
        ({"delta_min": -0.1}, "delta_min=-0.1"),
        ({"backend": "cuda"}, "backend='cuda' takes bf16 gate and value on a GPU"),
        ({"backend": "reference"}, "backend='reference' is not one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, message):
    tensors = {"gate": torch.zeros(1, 4, 3), "bias": torch.zeros(3), "value": torch.zeros(1, 4, 3)}
    arguments = tensors | {"state": None, "reset": None, "delta_min": 0.0} | change
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**arguments)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the same kernels run on the GPU in other tests")


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tiling_of_the_kernels_equals_the_reference(data):
    num_positions, num_channels = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 5))
    resets = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, num_positions - 1)), max_size=4))
    shape, with_state = (2, num_positions, num_channels), data.draw(st.booleans())
    inputs = make_inputs(shape, dtype=torch.float32, resets=resets, with_state=with_state)
    walk = kernel.Tiling(1, data.draw(st.integers(1, 3)), 4, 1, False, prefetch=data.draw(st.booleans()))
    chain = kernel.Tiling(data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3)), 4, 1, True, group=2)
    got = kernel_outputs_and_grads(inputs, *data.draw(st.permutations([walk, chain])))
    assert_close(got, outputs_and_grads(diagonal_scan_reference, in_float64(inputs)), 2e-6)


@interpreted
def test_the_kernels_hand_states_over_many_groups_of_tiles():
    inputs = make_inputs((1, 37, 3), dtype=torch.float32, rates=(-3.0, -1.0), resets=[(0, 20)])
    tiling = kernel.Tiling(2, 2, 4, 1, True, group=2)
    got = kernel_outputs_and_grads(inputs, tiling, tiling)
    assert_close(got, outputs_and_grads(diagonal_scan_reference, in_float64(inputs)), 2e-6)


@interpreted
def test_bf16_through_the_operator_and_its_own_tilings():
    inputs = make_inputs((1, 19, 6), dtype=torch.bfloat16, resets=[(0, 4)])
    got = outputs_and_grads(diagonal_scan, inputs, backend="triton")
    assert got["h"].dtype == got["grad gate"].dtype == torch.bfloat16 and got["grad bias"].dtype == torch.float32
    assert_close(got, outputs_and_grads(diagonal_scan_reference, in_float64(inputs)), 6e-3)


@interpreted
@pytest.mark.parametrize("x", [-torch.inf, -200.0, -61.0, 0.0, 61.0, 200.0, torch.inf])
def test_no_gate_or_value_overflows_the_kernels(x):
    value = torch.tensor([-torch.inf, -90.0, -13.5, 0.0, 13.5, 90.0, torch.inf]).view(1, 1, -1)
    inputs = (torch.full_like(value, x), torch.zeros(7), value, torch.full((1, 7), 0.5), None)
    tiling = kernel.Tiling(1, 1, 8, 1, False)
    got = kernel_outputs_and_grads(inputs, tiling, tiling)
    want = outputs_and_grads(diagonal_scan_reference, in_float64(inputs))
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-6, msg=name)


@interpreted
def test_nan_reaches_the_outputs_of_the_kernels():
    gate, bias, value, state, reset = make_inputs((1, 4, 3), dtype=torch.float32)
    gate[0, 1, 0] = value[0, 2, 1] = torch.nan
    h, _ = kernel.forward(gate, bias, value, state, reset, DELTA_MIN, kernel.Tiling(1, 2, 4, 1, False))
    assert torch.equal(h.isnan()[0], torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool())


def test_the_self_test_names_what_fails():
    """Compiled for a device that no process of this machine has."""
    program = (
        "import torch; from lfm.kernels.diagonal_scan.op import disagreement; "
        "print(disagreement('triton', torch.device('cpu'), torch.float32, torch.float32, 2, long=False))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("fail with "), found.stdout


def cuda_inputs(shape, **options):
    """As `make_inputs`, drawn on the GPU."""
    return tuple(None if x is None else x.cuda() for x in make_inputs(shape, **options))


GPU_SHAPES = [(1, 1, 1), (2, 300, 64), (3, 77, 200), (2, 1025, 96), (1, 5000, 130), (4, 2048, 64)]


@pytest.mark.slow
def test_the_bits_of_a_walk_do_not_depend_on_its_tiling():
    """Which the tiling of a launch relies on: it follows the batch size."""
    inputs = make_inputs((2, 37, 40), dtype=torch.float32, resets=[(0, 9), (1, 17)])
    inputs = tuple(x if x is None or not torch.cuda.is_available() else x.cuda() for x in inputs)
    found = [
        kernel_outputs_and_grads(inputs, *(kernel.Tiling(1, length, block, 1, False) for _ in range(2)))
        for length, block in ((32, 32), (16, 64), (8, 32))
    ]
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


def test_the_cuda_kernels_take_bf16_in_whole_vectors():
    takes = cuda.supports
    rows = torch.zeros(1, 2, 24, dtype=torch.bfloat16)
    assert takes(rows, rows) and takes(*rows.chunk(3, dim=-1)[:2])
    assert not takes(rows[..., :12], rows[..., :12])
    assert not takes(rows.float(), rows) and not takes(rows, rows.float()) and not takes(rows.half(), rows.half())


@interpreted
def test_a_warning_names_the_path_that_fails_and_the_one_taken():
    arguments = (torch.device("cpu"), torch.bfloat16, torch.bfloat16, 8)
    message = "the cuda kernels fail with ValueError: .* on a GPU .*; this process takes the slower triton path"
    with pytest.warns(RuntimeWarning, match=message):
        assert first_that_agrees(("cuda", "triton"), *arguments, long=False) == "triton"
    with pytest.warns(RuntimeWarning, match="takes the slower chunked path"):
        assert first_that_agrees(("cuda",), *arguments, long=False) == "chunked"


def test_without_a_compiler_the_cuda_kernels_say_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cuda.library.cache_clear()
    with pytest.raises(Unavailable, match=f"there is no nvcc under CUDA_HOME={tmp_path}"):
        cuda.library()


both_kernels = pytest.mark.parametrize("path", ["cuda", "triton"])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 6e-3)], ids=["fp32", "fp16", "bf16"]
)
def test_the_triton_kernels_equal_the_plain_path_in_float64(shape, dtype, bound):
    inputs = cuda_inputs(shape, dtype=dtype, resets=edges(shape), with_state=shape[0] != 4)
    got = outputs_and_grads(diagonal_scan, inputs, backend="triton")
    assert_close(got, outputs_and_grads(diagonal_scan, in_float64(inputs)), bound)


def edges(shape):
    """Resets at both ends and in the middle; none in sequences of 2048."""
    batch, num_positions, _ = shape
    return [(0, 0), (batch - 1, num_positions // 2), (0, num_positions - 1)] if num_positions != 2048 else []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 8), (3, 2, 16), (2, 300, 64), (3, 77, 200), (2, 512, 136), (1, 1024, 8), (2, 1025, 96), (1, 5000, 136),
     (4, 2048, 64), (400, 130, 72), (1, 20000, 64), (70, 1100, 128)],
    ids=str,
)  # fmt: skip
def test_the_cuda_kernels_equal_the_plain_path_in_float64(shape):
    inputs = cuda_inputs(shape, dtype=torch.bfloat16, resets=edges(shape), with_state=shape[0] != 4)
    got = outputs_and_grads(diagonal_scan, inputs, backend="cuda")
    want = outputs_and_grads(diagonal_scan, in_float64(inputs))
    assert_close(got, want, 6e-3)
    assert relative_error(got["final"], want["final"]) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("num_positions", [200, 1500])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_documents_of_any_length_are_kept_apart(num_positions, share):
    gate, bias, value, state, _ = cuda_inputs((3, num_positions, 72), dtype=torch.bfloat16)
    reset = torch.rand(3, num_positions, device="cuda") < share
    inputs = (gate, bias, value, state, reset)
    got = outputs_and_grads(diagonal_scan, inputs, backend="cuda")
    assert_close(got, outputs_and_grads(diagonal_scan, in_float64(inputs)), 6e-3)


@pytest.mark.gpu
def test_rows_that_are_not_aligned_are_copied():
    gate, bias, value, state, reset = cuda_inputs((2, 100, 64), dtype=torch.bfloat16, resets=[(1, 9)])
    shifted = torch.empty(2, 100, 201, dtype=torch.bfloat16, device="cuda")
    shifted[..., 1:65], shifted[..., 65:129] = gate, value
    want = outputs_and_grads(diagonal_scan, (gate, bias, value, state, reset), backend="cuda")
    views = (shifted[..., 1:65], bias, shifted[..., 65:129], state, reset)
    got = outputs_and_grads(diagonal_scan, views, backend="cuda")
    assert all(torch.equal(got[name], want[name]) for name in want)
    # A sum hands back one number, expanded.
    leaf = gate.clone().requires_grad_()
    diagonal_scan(leaf, bias, value, state, reset, delta_min=DELTA_MIN, backend="cuda")[0].sum().backward()
    ones = [torch.ones_like(value), torch.zeros_like(state)]
    h, _ = cuda.forward(gate, bias, value, state, reset, DELTA_MIN)
    assert torch.equal(leaf.grad, cuda.backward(gate, bias, value, state, reset, h, *ones, DELTA_MIN)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("num_positions", [60, 1100])
def test_nan_spreads_to_the_next_reset_and_no_further(num_positions):
    gate, bias, value, state, reset = cuda_inputs((2, num_positions, 64), dtype=torch.bfloat16, resets=[(0, 40)])
    gate[0, 3, 0] = value[0, 5, 1] = gate[1, 20, 2] = torch.nan
    h, final = cuda.forward(gate, bias, value, state, reset, DELTA_MIN)
    expected = torch.zeros_like(h, dtype=torch.bool)
    expected[0, 3:40, 0] = expected[0, 5:40, 1] = expected[1, 20:, 2] = True
    assert torch.equal(h.isnan(), expected) and torch.equal(final.isnan(), expected[:, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("x", [-torch.inf, -200.0, -61.0, 0.0, 61.0, 200.0, torch.inf])
def test_no_gate_or_value_overflows_the_cuda_kernels(x):
    value = torch.tensor([-torch.inf, -90.0, -13.5, -1.0, 0.0, 13.5, 90.0, torch.inf]).bfloat16().cuda().view(1, 1, -1)
    bias, state = torch.zeros(8, device="cuda"), torch.full((1, 8), 0.5, device="cuda")
    inputs = (torch.full_like(value, x), bias, value, state, None)
    got, want = kernel_outputs_and_grads(inputs, path="cuda"), outputs_and_grads(diagonal_scan, in_float64(inputs))
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=6e-3, atol=1e-6, msg=name)


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("shape", [(256, 512, 384), (48, 512, 384), (4, 8192, 3072), (1, 8192, 3072)], ids=str)
def test_the_measured_shapes_equal_the_plain_path_twice_with_the_same_bits(shape, path):
    """Against float64 on the first and last channels; outputs are poisoned by the fixture that fills empty memory."""
    batch, num_positions, num_channels = shape
    generator = torch.Generator("cuda").manual_seed(5)
    projected = torch.randn(batch, num_positions, 3 * num_channels, device="cuda", generator=generator).bfloat16()
    value, gate, _ = projected.chunk(3, dim=-1)
    half_lives = torch.logspace(0, 17, num_channels, base=2, dtype=torch.float64)  # to 131072 tokens
    bias = preactivation(math.log(2) / half_lives).float().cuda()
    state = torch.rand(batch, num_channels, device="cuda", generator=generator) - 0.5
    reset = torch.rand(batch, num_positions, device="cuda", generator=generator) > 0.999
    inputs = (gate, bias, value, state, reset)
    first, again = (outputs_and_grads(diagonal_scan, inputs, backend=path) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    gradients = upstream(first["h"], first["final"])
    for part in (slice(0, 8), slice(num_channels - 8, num_channels)):
        leaves = [x[..., part].double().detach().requires_grad_() for x in (gate, bias, value, state)]
        h, final = diagonal_scan(*leaves, reset, delta_min=DELTA_MIN)
        torch.autograd.backward([h, final], [g[..., part].double() for g in gradients])
        names = ("grad gate", "grad bias", "grad value", "grad state")
        want = {"h": h, "final": final} | {name: x.grad for name, x in zip(names, leaves, strict=True)}
        assert_close({name: first[name][..., part] for name in want}, want, 6e-3)


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("half_life", [4096.0, 65536.0])
def test_slow_channels_keep_their_half_life_on_the_gpu(half_life, path):
    """No input for 4096 tokens: the state decays by 2^(-4096 / half_life)."""
    bias = preactivation(torch.full((64,), math.log(2) / half_life, dtype=torch.float64) - DELTA_MIN).float().cuda()
    zero = torch.zeros(2, 4096, 64, device="cuda", dtype=torch.bfloat16)
    _, final = diagonal_scan(
        zero, bias, zero, torch.ones(2, 64, device="cuda"), None, delta_min=DELTA_MIN, backend=path
    )
    # A chain multiplies 4096 factors just below 1, each of which fp32 holds to half a unit of 2^-24.
    assert ((final.double() / 2 ** (-4096 / half_life)) - 1).abs().max() < 4096 * 2**-25


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("num_positions", [512, 3000])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(num_positions, path):
    inputs = cuda_inputs((33, num_positions, 96), dtype=torch.bfloat16, resets=[(5, 100)])
    gate, bias, value, state, reset = inputs
    h, final = module_of(path).forward(*inputs, DELTA_MIN)
    gradients = upstream(h, final)
    grads = module_of(path).backward(*inputs, h, *gradients, DELTA_MIN)
    alone = (gate[5:6], bias, value[5:6], state[5:6], reset[5:6])
    row, row_final = module_of(path).forward(*alone, DELTA_MIN)
    assert torch.equal(row, h[5:6]) and torch.equal(row_final, final[5:6])
    row_grads = module_of(path).backward(*alone, row, *(x[5:6] for x in gradients), DELTA_MIN)
    for index, name in enumerate(("gate", "bias", "value", "state")):
        assert name == "bias" or torch.equal(row_grads[index], grads[index][5:6]), name


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("num_positions", [500, 2000])
def test_a_cuda_graph_replays_forward_and_backward(num_positions, path):
    inputs = cuda_inputs((3, num_positions, 64), dtype=torch.bfloat16, resets=[(0, 77)])
    want = outputs_and_grads(diagonal_scan, inputs, backend=path)  # the first call compiles
    graph = torch.cuda.CUDAGraph()
    gradients = upstream(want["h"], want["final"])
    with torch.cuda.graph(graph):
        h, final = module_of(path).forward(*inputs, DELTA_MIN)
        grads = module_of(path).backward(*inputs, h, *gradients, DELTA_MIN)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    names = ("h", "final", "grad gate", "grad bias", "grad value", "grad state")
    assert all(torch.equal(x, want[name]) for name, x in zip(names, (h, final, *grads), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("long", [False, True], ids=["walked", "chained"])
def test_the_self_tests_pass_on_the_gpu(long):
    for path, dtype in (("cuda", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float32)):
        assert disagreement(path, torch.device("cuda"), dtype, dtype, 96, long=long) is None


@pytest.mark.gpu
def test_a_process_without_nvcc_takes_triton_and_says_so(tmp_path):
    program = (
        "import torch; from lfm.kernels.diagonal_scan import op; "
        "x = torch.zeros(1, 8, 64, dtype=torch.bfloat16, device='cuda'); print(op.best_path(x, x))"
    )
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment["PYTHONWARNINGS"] = "default"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "triton\n"
    assert "the cuda kernels fail with Unavailable: there is no nvcc under CUDA_HOME" in found.stderr
