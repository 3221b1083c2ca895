import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.kernels.diagonal_scan import diagonal_scan
from lfm.kernels.diagonal_scan.reference import diagonal_scan_reference
from tests.comparison import assert_close, relative_error


def make_inputs(shape=(2, 40, 5), *, seed=0, dtype=torch.float64, with_state=True, resets=(), rates=(-5.0, 0.5)):
    """delta, v, state, reset; decay rates log-uniform between powers of ten, resets (sequence, position) pairs."""
    batch, num_positions, num_channels = shape
    generator = torch.Generator().manual_seed(seed)
    low, high = rates
    delta = 10 ** (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64))
    v = torch.randn(shape, generator=generator, dtype=torch.float64).tanh()
    state = torch.randn(batch, num_channels, generator=generator, dtype=torch.float64).tanh()
    reset = None
    if resets:
        reset = torch.zeros(batch, num_positions, dtype=torch.bool)
        for sequence, position in resets:
            reset[sequence, position] = True
    wide = torch.promote_types(dtype, torch.float32)
    return delta.to(dtype), v.to(dtype), state.to(wide) if with_state else None, reset


def outputs_and_grads(scan, inputs):
    """Both outputs and every gradient by name, for a loss that weighs all of both outputs at random."""
    delta, v, state, reset = inputs
    leaves = {"delta": delta, "v": v, "state": state}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    h, final = scan(leaves["delta"], leaves["v"], leaves.get("state"), reset)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (h, final)]
    torch.autograd.backward([h, final], weights)
    return {"h": h, "final": final} | {f"grad {name}": x.grad for name, x in leaves.items()}


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
    inputs = make_inputs((2, num_positions, 3), resets=resets, rates=rates, with_state=data.draw(st.booleans()))
    assert_close(outputs_and_grads(diagonal_scan, inputs), outputs_and_grads(diagonal_scan_reference, inputs), 1e-11)


def test_gradients_match_finite_differences():
    delta, v, state, reset = make_inputs((2, 7, 3), resets=[(0, 3), (1, 0)], rates=(-1.0, 0.5))
    leaves = [x.requires_grad_() for x in (delta, v, state) if x is not None]
    assert torch.autograd.gradcheck(lambda delta, v, state: diagonal_scan(delta, v, state, reset), leaves)


@pytest.mark.parametrize("rate", [0.0, 1e-7, 1e-2, 5.0, 88.0, 1e4, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_products_of_decays_that_underflow_or_stay_one_are_exact_to_rounding(rate, dtype):
    """Both round at each of 300 positions, by up to half a unit in the last place each time."""
    _, v, state, _ = make_inputs((1, 300, 3), dtype=dtype)
    delta = torch.full_like(v, rate)
    delta[:, ::7] = 1e-3
    got, _ = diagonal_scan(delta, v, state, None)
    assert relative_error(got, diagonal_scan_reference(delta, v, state, None)[0]) < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rate", [1e-9, 1.0, 30.0, 80.0])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
def test_the_gradient_of_any_decay_has_all_its_digits(rate, dtype, bound):
    _, v, state, _ = make_inputs((2, 1, 4), dtype=dtype)
    delta = torch.full_like(v, rate).requires_grad_()
    assert state is not None
    diagonal_scan(delta, v, state, None)[0].sum().backward()
    want = torch.exp(-torch.tensor(rate, dtype=torch.float64)) * (v.double() - state[:, None].double())
    # exp itself is good to `rate` units in the last place of its argument.
    assert delta.grad is not None and relative_error(delta.grad, want) < bound * max(1, rate)


def test_no_decay_keeps_the_state_and_full_decay_takes_the_value():
    _, v, state, _ = make_inputs((2, 30, 4))
    assert state is not None
    kept, _ = diagonal_scan(torch.zeros_like(v), v, state, None)
    assert torch.equal(kept, state[:, None].expand_as(kept))
    taken, _ = diagonal_scan(torch.full_like(v, torch.inf), v, state, None)
    assert torch.equal(taken, v)


def test_a_slow_channel_gains_what_it_loses_in_fp32():
    """With the gain formed as 1 - exp(-delta) in fp32 it would be 19 % too large here."""
    delta = torch.full((1, 4096, 1), 1e-7)
    _, final = diagonal_scan(delta, torch.ones_like(delta), None, None)
    exact = -torch.expm1(torch.tensor(-4096e-7, dtype=torch.float64))
    assert abs(final.double() / exact - 1).item() < 1e-3


def test_states_are_means_of_the_values_and_never_exceed_them():
    delta, v, state, _ = make_inputs((4, 500, 8), dtype=torch.float32)
    h, _ = diagonal_scan(delta, v, state, None)
    assert h.abs().max() <= 1


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_narrow_inputs_stay_within_their_rounding(dtype, bound):
    inputs = make_inputs((2, 400, 16), dtype=dtype, resets=[(0, 111)])
    got = outputs_and_grads(diagonal_scan, inputs)
    exact = tuple(x.double() if x is not None and x.is_floating_point() else x for x in inputs)
    assert got["h"].dtype == got["grad v"].dtype == dtype and got["final"].dtype == torch.float32
    assert_close(got, outputs_and_grads(diagonal_scan_reference, exact), bound)


def test_fp32_rates_with_bf16_values_keep_their_own_gradient():
    delta, v, state, reset = make_inputs((1, 50, 4), dtype=torch.float32)
    got = outputs_and_grads(diagonal_scan, (delta, v.bfloat16(), state, reset))
    want = outputs_and_grads(diagonal_scan_reference, (delta.double(), v.bfloat16().double(), state, reset))
    assert got["grad delta"].dtype == torch.float32 and got["grad v"].dtype == torch.bfloat16
    assert_close(got, want, 6e-3)
    assert relative_error(got["final"], want["final"]) < 1e-6


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 39))
def test_the_whole_equals_the_halves_with_the_state_handed_on(cut):
    delta, v, state, reset = make_inputs((2, 40, 6), resets=[(0, 13), (1, 30)])
    assert reset is not None
    whole, whole_final = diagonal_scan(delta, v, state, reset)
    first, between = diagonal_scan(delta[:, :cut], v[:, :cut], state, reset[:, :cut])
    second, final = diagonal_scan(delta[:, cut:], v[:, cut:], between, reset[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, whole_final, rtol=1e-12, atol=1e-12)


def test_nothing_crosses_a_reset():
    delta, v, state, _ = make_inputs((1, 60, 4), resets=[])
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, 23] = True
    v.requires_grad_()
    h, _ = diagonal_scan(delta, v, state, reset)
    alone, _ = diagonal_scan(delta[:, 23:], v[:, 23:], None, None)
    torch.testing.assert_close(h[:, 23:], alone, rtol=1e-12, atol=1e-12)
    h[:, 23:].sum().backward()
    assert v.grad is not None and (v.grad[:, :23] == 0).all() and (v.grad[:, 23:] != 0).all()


def test_a_row_has_the_same_bits_in_any_batch():
    delta, v, state, reset = make_inputs((4, 50, 8), dtype=torch.float32, resets=[(0, 9), (2, 40)])
    assert state is not None and reset is not None
    order = torch.tensor([2, 0, 3])
    h, final = diagonal_scan(delta, v, state, reset)
    permuted, permuted_final = diagonal_scan(delta[order], v[order], state[order], reset[order])
    assert torch.equal(permuted, h[order]) and torch.equal(permuted_final, final[order])


def test_inputs_are_not_written_to():
    inputs = make_inputs((2, 16, 4), resets=[(0, 3)])
    copies = [x.clone() for x in inputs if x is not None]
    outputs_and_grads(diagonal_scan, inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(4, 3)}, "v has shape"),
        ({"delta": torch.zeros(1, 4, 2)}, "delta has shape"),
        ({"delta": torch.zeros(1, 4, 3, dtype=torch.int64)}, "delta is torch.int64"),
        ({"state": torch.zeros(3)}, "state has shape"),
        ({"state": torch.zeros(1, 3, dtype=torch.bfloat16)}, "at least float32"),
        ({"reset": torch.zeros(1, 4)}, "must be bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, message):
    arguments = {"delta": torch.zeros(1, 4, 3), "v": torch.zeros(1, 4, 3), "state": None, "reset": None}
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)],
    ids=["fp64", "fp32", "bf16"],
)
def test_cuda_equals_the_cpu(dtype, bound):
    inputs = make_inputs((2, 300, 64), dtype=dtype, resets=[(0, 77), (1, 128)])
    got = outputs_and_grads(diagonal_scan, [None if x is None else x.cuda() for x in inputs])
    assert_close({name: x.cpu() for name, x in got.items()}, outputs_and_grads(diagonal_scan, inputs), bound)
