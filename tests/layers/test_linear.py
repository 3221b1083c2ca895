import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lfm.layers.linear import Linear, _BiasedProduct
from tests.comparison import assert_close


def layer_and_input(dtype, device, *, bias=True):
    layer = Linear(24, 40, bias=bias).to(device, dtype)
    return layer, torch.randn(3, 50, 24, device=device).to(dtype).requires_grad_()


def gradients(forward, leaves):
    y = forward()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x", "bias"), ("weight", "bias"), ("bias",), ("x",)])
def test_only_the_gradients_asked_for_are_computed(wanted):
    layer, x = layer_and_input(torch.float64, "cpu")
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    wanted = {name: leaves[name] for name in wanted}
    got = gradients(lambda: _BiasedProduct.apply(x, layer.weight, layer.bias), wanted)
    want = gradients(lambda: nn.functional.linear(x, layer.weight, layer.bias), wanted)
    assert_close(got, want, 1e-14)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _BiasedProduct.apply(x, layer.weight, layer.bias)
    assert len(saved) == ("x" in wanted) + ("weight" in wanted)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (0, 24), (2, 3, 4, 24)], ids=str)
def test_an_input_may_have_any_rank(shape):
    layer, _ = layer_and_input(torch.float64, "cpu")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    got = gradients(lambda: _BiasedProduct.apply(x, layer.weight, layer.bias), leaves)
    want = gradients(lambda: nn.functional.linear(x, layer.weight, layer.bias), leaves)
    assert all(torch.allclose(got[name], want[name], rtol=1e-12) for name in leaves)


def test_on_a_cpu_it_is_the_plain_layer():
    layer, x = layer_and_input(torch.bfloat16, "cpu")
    assert layer.state_dict().keys() == nn.Linear(24, 40).state_dict().keys()
    assert "Product" not in type(layer(x).grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=["bf16", "fp16"])
def test_on_a_gpu_every_gradient_is_right(dtype, bound):
    layer, x = layer_and_input(dtype, "cuda")
    assert "Product" in type(layer(x).grad_fn).__name__
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    got, want = gradients(lambda: layer(x), leaves), gradients(lambda: nn.functional.linear(*wide.values()), wide)
    assert_close(got, want, bound)
    again = gradients(lambda: checkpoint(layer, x, use_reentrant=False), leaves)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
def test_without_a_trained_bias_it_is_the_plain_layer():
    for layer, x in (layer_and_input(torch.bfloat16, "cuda", bias=False), layer_and_input(torch.float32, "cuda")):
        assert "Product" not in type(layer(x).grad_fn).__name__
    layer, x = layer_and_input(torch.bfloat16, "cuda")
    layer.bias.requires_grad_(False)
    assert "Product" not in type(layer(x).grad_fn).__name__
