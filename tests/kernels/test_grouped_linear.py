import importlib.metadata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.kernels.grouped_linear import grouped_linear
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient


def _inputs(sizes, behind, N, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, weight, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((sum(sizes) + behind, K), (len(sizes), N, K), (sum(sizes) + behind, N))
    )
    return rows, weight, torch.tensor([0, *sizes]).cumsum(0).int(), grad


def _outputs_and_grads(run, rows, weight, boundaries, grad):
    rows, weight = (x.detach().clone().requires_grad_() for x in (rows, weight))
    y = run(rows, weight, boundaries)
    y.backward(grad)
    return {"y": y.detach(), "rows": rows.grad, "weight": weight.grad}


def _outputs_and_sums(run, rows, weight, boundaries, grad):
    """Of two micro-batches, the second without the first half of its rows' gradients."""
    weight, found = summed(weight), {}
    second = grad.clone()
    second[: len(grad) // 2] = 0
    for i, each in enumerate((grad, second)):
        leaf = rows.detach().clone().requires_grad_()
        y = run(leaf, weight, boundaries)
        y.backward(each)
        found |= {f"y{i}": y.detach(), f"rows{i}": leaf.grad}
    return found | {"weight": summed_gradient(weight)}


def _wanted_sums(rows, weight, boundaries, grad):
    found = _outputs_and_grads(_row_by_row, rows, weight, boundaries, grad)
    second = grad.clone()
    second[: len(grad) // 2] = 0
    other = _outputs_and_grads(_row_by_row, rows, weight, boundaries, second)
    return {
        **{f"{name}{i}": each[name] for i, each in enumerate((found, other)) for name in ("y", "rows")},
        "weight": found["weight"] + other["weight"],
    }


def _row_by_row(rows, weight, boundaries):
    group = torch.searchsorted(boundaries[1:].long(), torch.arange(len(rows)), right=True)
    inside = group < len(weight)
    return torch.stack([weight[e] @ row for e, row in zip(group * inside, rows, strict=True)]) * inside[:, None]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 10**6))
def test_a_row_meets_the_matrix_of_its_group(sizes, behind, seed):
    if sum(sizes) + behind == 0:
        sizes = [1, *sizes]
    inputs = _inputs(sizes, behind, 3, 4, seed)
    got = _outputs_and_grads(lambda *x: grouped_linear(*x, covered=behind == 0), *inputs)
    want = _outputs_and_grads(_row_by_row, *inputs)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("sizes, behind", [([3, 0, 5], 0), ([0, 4, 1], 2)], ids=str)
def test_weights_add_up_their_gradients(sizes, behind):
    inputs = _inputs(sizes, behind, 3, 4)
    got = _outputs_and_sums(lambda *x: grouped_linear(*x, covered=behind == 0), *inputs)
    assert_close(got, _wanted_sums(*inputs), 1e-12)


def test_narrow_weights_gradients_are_never_rounded():
    inputs = [x if x.dtype == torch.int32 else x.bfloat16() for x in _inputs([40, 0, 60], 0, 3, 4)]
    got = _outputs_and_sums(grouped_linear, *inputs)
    want = _wanted_sums(*(x if x.dtype == torch.int32 else x.double() for x in inputs))
    assert_close({"weight": got["weight"]}, {"weight": want["weight"]}, 1e-6)


def test_without_any_row_every_matrix_has_a_zero_gradient():
    rows, weight, boundaries, grad = _inputs([0, 0], 0, 3, 4)
    got = _outputs_and_grads(grouped_linear, rows, weight, boundaries, grad)
    assert got["y"].shape == (0, 3) and torch.equal(got["weight"], torch.zeros_like(weight))


@pytest.mark.parametrize(
    "rows, weight, boundaries, message",
    [
        ((5, 4), (2, 3, 5), torch.zeros(3, dtype=torch.int32), r"rows has shape \[5, 4\], weight \[2, 3, 5\]"),
        ((5, 4), (2, 3, 4), torch.zeros(2, dtype=torch.int32), r"boundaries is torch.int32 of shape \[2\]"),
        ((5, 4), (2, 3, 4), torch.zeros(3), r"it must be torch.int32 \[3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(rows, weight, boundaries, message):
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.zeros(rows), torch.zeros(weight), boundaries)


def _backends():
    try:
        importlib.metadata.version("quack-kernels")
        without = ()
    except importlib.metadata.PackageNotFoundError:
        without = (pytest.mark.skip("needs quack-kernels: pip install 'lfm-training[flash-attn]'"),)
    return ["torch", pytest.param("quack", marks=without)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize(
    "sizes, behind, N, K",
    [
        ([700, 0, 1, 300], 0, 1408, 512),
        ([0, 0, 900], 0, 2816, 64),
        ([40, 50, 60], 33, 96, 200),
        ([0, 0, 0], 20, 64, 64),
        ([2000, 17, 2300, 1], 500, 3072, 1408),
    ],
    ids=str,
)
def test_grouped_products_equal_float64_and_repeat_their_bits(sizes, behind, N, K, backend):
    inputs = [x.cuda() if x.dtype == torch.int32 else x.bfloat16().cuda() for x in _inputs(sizes, behind, N, K)]
    # A product that is not written must not show, whatever the memory held.
    torch.full((64_000_000,), torch.nan, device="cuda")

    def run():
        return _outputs_and_grads(lambda *x: grouped_linear(*x, covered=behind == 0, backend=backend), *inputs)

    got, again = run(), run()
    assert all(torch.equal(got[name], again[name]) for name in got)
    exact = [x.cpu() if x.dtype == torch.int32 else x.double().cpu() for x in inputs]
    want = _outputs_and_grads(lambda *x: grouped_linear(*x, backend="reference"), *exact)
    assert_close({name: x.cpu() for name, x in got.items()}, want, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("N, K", [(2304, 3072), (3072, 1152), (2816, 64), (96, 200)], ids=str)
def test_grouped_products_add_up_and_repeat_their_bits(N, K, backend):
    inputs = [x.cuda() if x.dtype == torch.int32 else x.bfloat16().cuda() for x in _inputs([700, 0, 1, 300], 33, N, K)]

    def run():
        return _outputs_and_sums(lambda *x: grouped_linear(*x, covered=False, backend=backend), *inputs)

    got, again = run(), run()
    assert all(torch.equal(got[name], again[name]) for name in got)
    wide = [x if x.dtype == torch.int32 else x.double() for x in inputs]
    want = _outputs_and_sums(lambda *x: grouped_linear(*x, backend="reference"), *wide)
    of_weight, right = {"weight": got.pop("weight")}, {"weight": want.pop("weight")}
    assert_close(of_weight, right, 1e-5 if backend == "quack" else 4e-3)
    assert_close(got, want, 4e-3)


@pytest.mark.gpu
def test_widths_that_eight_does_not_divide_are_multiplied_too():
    inputs = [x.cuda() if x.dtype == torch.int32 else x.bfloat16().cuda() for x in _inputs([3, 5], 1, 7, 9)]
    got = _outputs_and_grads(lambda *x: grouped_linear(*x, covered=False), *inputs)
    want = _outputs_and_grads(grouped_linear, *(x if x.dtype == torch.int32 else x.double() for x in inputs))
    assert_close(got, want, 1e-2)
