"""`linear`, and the sums that its weights' gradients go to."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lfm.kernels.linear import linear
from lfm.layers.linear import Linear
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient


def _problem(dtype=torch.float64, device="cpu", rows=(3, 5), K=8, N=6, scale=1.0):
    """Inputs of two micro-batches, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(device, dtype)

    return [(draw(*rows, K), draw(*rows, N)) for _ in range(2)], draw(N, K), draw(N)


def _with_sums(micro_batches, weight, bias, run=linear):
    weight, bias = summed(weight), None if bias is None else summed(bias)
    found = {}
    for i, (x, grad) in enumerate(micro_batches):
        x = x.clone().requires_grad_()
        y = run(x, weight, bias)
        y.backward(grad)
        found |= {f"y{i}": y.detach(), f"x{i}": x.grad}
    found["weight"] = summed_gradient(weight)
    return found | ({} if bias is None else {"bias": summed_gradient(bias)})


def _plain(micro_batches, weight, bias):
    weight, bias = weight.clone().requires_grad_(), None if bias is None else bias.clone().requires_grad_()
    found = {}
    for i, (x, grad) in enumerate(micro_batches):
        x = x.clone().requires_grad_()
        y = F.linear(x, weight, bias)
        y.backward(grad)
        found |= {f"y{i}": y.detach(), f"x{i}": x.grad}
    found["weight"] = weight.grad
    return found | ({} if bias is None else {"bias": bias.grad})


def _double(micro_batches, *parameters):
    return [(x.double(), grad.double()) for x, grad in micro_batches], *(
        p if p is None else p.double() for p in parameters
    )


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)], ids=str)
def test_sums_over_micro_batches_are_the_gradients_of_autograd(rows, with_bias):
    micro_batches, weight, bias = _problem(rows=rows)
    bias = bias if with_bias else None
    assert_close(_with_sums(micro_batches, weight, bias), _plain(micro_batches, weight, bias), 1e-14)


def test_without_a_sum_it_is_torchs_linear_bit_for_bit():
    micro_batches, weight, bias = _problem(torch.float32)
    want = _plain(micro_batches, weight, bias)
    layer = Linear(8, 6)
    layer.load_state_dict({"weight": weight, "bias": bias})
    for i, (x, grad) in enumerate(micro_batches):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(grad)
        assert torch.equal(y, want[f"y{i}"]) and torch.equal(x.grad, want[f"x{i}"])
    assert torch.equal(layer.weight.grad, want["weight"]) and torch.equal(layer.bias.grad, want["bias"])


def test_a_narrow_weights_gradient_is_never_rounded():
    micro_batches, weight, bias = _problem(torch.bfloat16, rows=(64,))
    got, want = _with_sums(micro_batches, weight, bias), _plain(*_double(micro_batches, weight, bias))
    for name in ("weight", "bias"):
        assert_close({name: got[name]}, {name: want[name]}, 1e-6)  # bf16 alone is off by 2e-3


def test_a_recomputed_product_adds_once():
    micro_batches, weight, bias = _problem()

    def run(x, weight, bias):
        return checkpoint(linear, x, weight, bias, use_reentrant=False)

    assert_close(_with_sums(micro_batches, weight, bias, run), _plain(micro_batches, weight, bias), 1e-14)


def test_a_weight_that_is_used_twice_has_both_gradients():
    ((x, grad), _), weight, _ = _problem(N=8)
    plain, twice = weight.clone().requires_grad_(), summed(weight)
    F.linear(F.linear(x, plain).tanh(), plain).backward(grad)
    linear(linear(x, twice).tanh(), twice).backward(grad)
    assert_close({"weight": summed_gradient(twice)}, {"weight": plain.grad}, 1e-14)


class _Queue:
    def __init__(self):
        self.work = []

    def put(self, work):
        self.work.append(work)


def test_products_that_can_wait_are_made_after_the_inputs_gradient():
    ((x, grad), _), weight, _ = _problem()
    queue = _Queue()
    leaf, x = summed(weight, later=queue), x.clone().requires_grad_()
    linear(x, leaf).backward(grad)
    assert x.grad is not None and leaf.gradient_sum.is_empty and len(queue.work) == 1
    queue.work.pop()()
    assert torch.allclose(summed_gradient(leaf), grad.flatten(0, 1).T @ x.detach().flatten(0, 1))


def test_what_needs_no_gradient_has_none():
    ((x, grad), _), weight, _ = _problem()
    leaf = summed(weight)
    with torch.no_grad():
        assert not linear(x, leaf).requires_grad
    assert leaf.gradient_sum.is_empty
    frozen, x = summed(weight).requires_grad_(False), x.clone().requires_grad_()
    linear(x, frozen).backward(grad)
    assert x.grad is not None and frozen.gradient_sum.is_empty


@pytest.mark.gpu
@pytest.mark.parametrize("N", [8, 5120])
def test_bf16_on_a_gpu_equals_float64_and_repeats_its_bits(N):
    micro_batches, weight, bias = _problem(torch.bfloat16, "cuda", rows=(2, 4096), K=3072, N=N)
    got, again = (_with_sums(micro_batches, weight, bias) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)
    want = _plain(*_double(micro_batches, weight, bias))
    assert_close({n: got.pop(n) for n in ("weight", "bias")}, {n: want.pop(n) for n in ("weight", "bias")}, 1e-5)
    assert_close(got, want, 4e-3)
