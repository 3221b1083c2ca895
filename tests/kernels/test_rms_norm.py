import pytest
import torch

from lfm.kernels.rms_norm import add_rms_norm
from lfm.kernels.rms_norm.reference import add_rms_norm_reference
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def _run(fn, tensors, grads):
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    total, normalized = fn(*leaves.values())
    given = [leaf for leaf in leaves.values() if leaf is not None]
    found = torch.autograd.grad((total, normalized), given, [grad.to(total.dtype) for grad in grads])
    names = [name for name, leaf in leaves.items() if leaf is not None]
    return {"total": total, "normalized": normalized, **dict(zip(names, found, strict=True))}


def _compare(shape, dtype, bound, *, added):
    x, y = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    tensors = {"x": x, "y": y if added else None, "weight": torch.randn(shape[-1], device=DEVICE).to(dtype)}
    grads = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    got = _run(lambda *t: add_rms_norm(*t, eps=EPS, backend="triton"), tensors, grads)
    if DEVICE == "cuda":
        again = _run(lambda *t: add_rms_norm(*t, eps=EPS, backend="triton"), tensors, grads)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert got["total"].dtype == got["weight"].dtype == dtype
    assert torch.equal(got["total"], x + y if added else x)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    assert_close(got, _run(lambda *t: add_rms_norm_reference(*t, EPS), wide, grads), bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 48), (600, 130)], ids=str)
def test_the_kernel_equals_the_definition(shape, added, dtype, bound):
    _compare(shape, dtype, bound, added=added)


def test_a_weight_adds_up_its_gradient_unrounded():
    x, weight = torch.randn(70, 48, device=DEVICE).half(), torch.randn(48, device=DEVICE).half()
    own, wide = summed(weight), weight.double().requires_grad_()
    for grad in torch.randn(2, 70, 48, device=DEVICE).half():
        add_rms_norm(x, None, own, eps=EPS, backend="triton")[1].backward(grad)
        add_rms_norm_reference(x.double(), None, wide, EPS)[1].backward(grad.double())
    assert_close({"weight": summed_gradient(own)}, {"weight": wide.grad}, 1e-6)


def test_what_nobody_reads_has_no_gradient():
    x, y, weight = (torch.randn(4, 8, device=DEVICE)[i:].squeeze(0) for i in (0, 0, 3))
    x, y = x.requires_grad_(), y.requires_grad_()
    total, _ = add_rms_norm(x, y, weight, eps=EPS, backend="triton")
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones_like(x))
    _, normalized = add_rms_norm(x, y, weight, eps=EPS, backend="triton")
    _, want = add_rms_norm_reference(x, y, weight, EPS)
    grads = [torch.autograd.grad(n.square().sum(), (x, y)) for n in (normalized, want)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_no_rows_have_no_outputs():
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    total, normalized = add_rms_norm(x, x, torch.ones(8, device=DEVICE), eps=EPS, backend="triton")
    (total + normalized).sum().backward()
    assert x.grad.shape == (0, 8)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], y \[2, 4\], weight \[3\]"):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("shape", [(8192, 3072), (1, 1001, 768)], ids=str)
def test_large_tensors_equal_float64(shape, added):
    _compare(shape, torch.bfloat16, 6e-3, added=added)
