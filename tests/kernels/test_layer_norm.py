import pytest
import torch

from lfm.kernels.layer_norm import layer_norm
from lfm.kernels.layer_norm.reference import layer_norm_reference
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("x", "weight", "bias")


def _run(fn, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    normalized = fn(*leaves)
    found = torch.autograd.grad(normalized, leaves, grad.to(normalized.dtype))
    return {"normalized": normalized, **dict(zip(NAMES, found, strict=True))}


def _compare(shape, dtype, bound):
    """Of rows that lie off zero."""
    x, grad = 3 + torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
    tensors = [x.to(dtype), *(torch.randn(shape[-1], device=DEVICE).to(dtype) for _ in range(2))]
    got = _run(lambda *t: layer_norm(*t, eps=EPS, backend="triton"), tensors, grad)
    if DEVICE == "cuda":
        again = _run(lambda *t: layer_norm(*t, eps=EPS, backend="triton"), tensors, grad)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert {each.dtype for each in got.values()} == {dtype}
    want = _run(lambda *t: layer_norm_reference(*t, EPS), [t.double() for t in tensors], grad)
    assert_close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 1e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 48), (600, 64), (40, 4100)], ids=str)
def test_the_kernel_equals_the_definition(shape, dtype, bound):
    _compare(shape, dtype, bound)


def test_gain_and_bias_add_up_their_gradients_unrounded():
    x, *given = (torch.randn(*shape, device=DEVICE).half() for shape in ((70, 48), (48,), (48,)))
    own, wide = [summed(each) for each in given], [each.double().requires_grad_() for each in given]
    for grad in torch.randn(2, 70, 48, device=DEVICE).half():
        layer_norm(x, *own, eps=EPS, backend="triton").backward(grad)
        layer_norm_reference(x.double(), *wide, EPS).backward(grad.double())
    for ours, theirs in zip(own, wide, strict=True):
        assert_close({"gradient": summed_gradient(ours)}, {"gradient": theirs.grad}, 1e-6)


def test_no_rows_and_wrong_shapes():
    empty = layer_norm(torch.zeros(0, 8, device=DEVICE), *torch.ones(2, 8, device=DEVICE), eps=EPS)
    assert empty.shape == (0, 8)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], weight \[3\], bias \[4\]; weight and bias must be"):
        layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(4), eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 64), (8192, 256), (1, 1001, 768)], ids=str)
def test_large_tensors_equal_float64(shape):
    _compare(shape, torch.bfloat16, 6e-3)
