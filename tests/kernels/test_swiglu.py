import pytest
import torch

from lfm.kernels.swiglu import swiglu
from lfm.kernels.swiglu.reference import swiglu_reference
from tests.comparison import assert_close

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _output_and_grad(fn, gate_up, grad):
    gate_up = gate_up.detach().clone().requires_grad_()
    y = fn(gate_up)
    y.backward(grad.to(y.dtype))
    return {"y": y, "gate_up": gate_up.grad}


def _compare(shape, dtype, bound):
    gate_up, grad = torch.randn(shape).mul(2).to(DEVICE, dtype), torch.randn(*shape[:-1], shape[-1] // 2)
    grad = grad.to(DEVICE, dtype)
    got = _output_and_grad(lambda x: swiglu(x, backend="triton"), gate_up, grad)
    assert got["y"].dtype == got["gate_up"].dtype == dtype
    if DEVICE == "cuda":
        again = _output_and_grad(lambda x: swiglu(x, backend="triton"), gate_up, grad)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert_close(got, _output_and_grad(swiglu_reference, gate_up.double(), grad.double()), bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 5e-4)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 2), (17, 260), (2, 5, 96)], ids=str)
def test_the_kernel_equals_the_definition(shape, dtype, bound):
    _compare(shape, dtype, bound)


def test_a_factor_multiplies_output_and_gradient():
    gate_up, grad = torch.randn(17, 260).to(DEVICE), torch.randn(17, 130).to(DEVICE)
    got = _output_and_grad(lambda x: swiglu(x, scale=-0.3, backend="triton"), gate_up, grad)
    want = _output_and_grad(lambda x: -0.3 * swiglu_reference(x), gate_up.double(), grad.double())
    assert_close(got, want, 1e-6)
    assert_close(got, _output_and_grad(lambda x: swiglu(x, scale=-0.3, backend="reference"), gate_up, grad), 1e-6)


def test_no_rows_have_no_outputs():
    gate_up = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    swiglu(gate_up, backend="triton").sum().backward()
    assert gate_up.grad.shape == (0, 8)


def test_gates_far_from_zero_stay_finite():
    gate_up = torch.tensor([[-80.0, 80.0, 3.0, 3.0]], device=DEVICE)
    got = _output_and_grad(lambda x: swiglu(x, backend="triton"), gate_up, torch.ones(1, 2, device=DEVICE))
    assert torch.allclose(got["y"].cpu(), torch.tensor([[0.0, 240.0]]))
    assert torch.allclose(got["gate_up"].cpu(), torch.tensor([[0.0, 3.0, 0.0, 80.0]]))


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must hold gate and up"):
        swiglu(torch.zeros(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16384, 2816), (1001, 2 * 1411)], ids=str)
def test_large_tensors_equal_float64(shape):
    _compare(shape, torch.bfloat16, 3e-3)
