import pytest
import torch

from lfm.kernels.permutation import combine, dispatch, sorted_places
from lfm.kernels.permutation.reference import combine_reference, sorted_places_reference
from tests.comparison import assert_close, relative_error

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}


def _routed(keys, num_keys, k):
    return sorted_places(keys.to(DEVICE), num_keys, backend="triton").view(-1, k)


def _run(backend, x, place, weights, grad):
    """Rows to the experts and back, weighted; every output and gradient.  `grad_rows` passes through dispatch alone."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    rows = dispatch(x, place, backend=backend)
    rows.retain_grad()
    y = combine(rows * 1.5, place, weights, backend=backend)
    y.backward(grad)
    summed = combine(rows.detach(), place, backend=backend)
    return {"rows": rows, "y": y, "summed": summed, "x": x.grad, "weights": weights.grad, "grad rows": rows.grad}


def _compare(keys, num_keys, k, D, dtype):
    n = len(keys) // k
    place = _routed(keys, num_keys, k)
    x, grad, weights = (torch.randn(n, d, device=DEVICE) for d in (D, D, k))
    x, grad = x.to(dtype), grad.to(dtype)
    got = _run("triton", x, place, weights, grad)
    if DEVICE == "cuda":
        again = _run("triton", x, place, weights, grad)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert got["weights"].dtype == torch.float32 and got["y"].dtype == dtype
    want = _run("reference", x.double(), place, weights.double(), grad.double())
    # The rows between the two ops are rounded once more, and so is their gradient on its way to x.
    assert_close(got, want, 2 * BOUNDS[dtype])
    assert torch.equal(got["rows"][place.flatten()], x.repeat_interleave(k, 0))


@pytest.mark.parametrize("num_keys", [1, 2, 9, 100, 257])
@pytest.mark.parametrize("m", [1, 15, 700])
def test_the_counting_sort_is_the_stable_sort(m, num_keys):
    keys = torch.randint(0, num_keys, (m,))
    assert torch.equal(sorted_places(keys.to(DEVICE), num_keys, backend="triton").cpu(), sorted_places_reference(keys))


@pytest.mark.parametrize("only", [0, 4, 8], ids=["first", "middle", "last"])
def test_all_on_one_expert_keep_their_order(only):
    keys = torch.full((1000,), only, device=DEVICE)
    assert torch.equal(sorted_places(keys, 9, backend="triton").cpu(), torch.arange(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("n, k, D", [(1, 1, 1), (5, 2, 1030), (9, 3, 24)])
def test_the_kernels_equal_the_definitions(n, k, D, dtype):
    _compare(torch.randint(0, 4, (n * k,)), 4, k, D, dtype)


@pytest.mark.parametrize("n, k", [(0, 2), (7, 1)])
def test_rows_go_there_and_back(n, k):
    x = torch.randn(n, 6, device=DEVICE)
    place = _routed(torch.randint(0, 3, (n * k,)), 3, k)
    assert torch.equal(combine(dispatch(x, place, backend="triton"), place, backend="triton"), k * x)


def test_an_expanded_gradient_is_taken():
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    place = _routed(torch.randint(0, 3, (8,)), 3, 2)
    combine(
        dispatch(x, place, backend="triton"), place, torch.ones(4, 2, device=DEVICE), backend="triton"
    ).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_a_weighted_sum_is_rounded_once():
    """The plain path in half precision multiplies by a rounded weight, and rounds the products and the sum."""
    rows, weights = torch.randn(64, 32).half().to(DEVICE), torch.rand(32, 2, device=DEVICE)
    place = torch.randperm(64).view(32, 2).to(DEVICE)
    want = combine_reference(rows.double(), place, weights.double())
    once = 1.01 * relative_error(want.half(), want)
    assert relative_error(combine(rows, place, weights, backend="triton"), want) < once
    assert relative_error(combine(rows, place, weights, backend="reference"), want) > once


@pytest.mark.parametrize(
    "rows, place, weights, message",
    [
        (torch.zeros(4, 3), torch.zeros(2, 2, dtype=torch.int32), None, "torch.int64"),
        (torch.zeros(3, 3), torch.zeros(2, 2, dtype=torch.int64), None, "needs \\[4, D\\]"),
        (torch.zeros(4, 3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1), "must agree"),
    ],
    ids=["dtype", "rows", "weights"],
)
def test_mistakes_are_named(rows, place, weights, message):
    with pytest.raises(ValueError, match=message):
        combine(rows, place, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, D, E", [(8192, 2, 3072, 8), (1000, 4, 1411, 250)], ids=str)
def test_large_moves_equal_float64(n, k, D, E):
    keys = torch.rand(n, E).topk(k).indices.flatten()
    assert torch.equal(sorted_places(keys.cuda(), E).cpu(), sorted_places_reference(keys))
    _compare(keys, E, k, D, torch.bfloat16)
