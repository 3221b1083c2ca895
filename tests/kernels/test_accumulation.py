import pytest
import torch

from lfm.kernels.accumulation import accumulate_

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(0,), (1,), (5, 1000), (3, 4, 2049)], ids=str)
def test_the_sum_is_that_of_pytorch_bit_for_bit(shape):
    total, grad = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).half()
    want = total + grad
    accumulate_(total, grad, backend="triton")
    assert torch.equal(total, want)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_factor_multiplies_the_gradient_and_the_first_is_stored(backend):
    before, grad = torch.randn(5, 1000, device=DEVICE), torch.randn(5, 1000, device=DEVICE).half()
    before[0, 0] = torch.nan  # of no consequence where it is written over
    factor = torch.tensor(0.37, device=DEVICE)
    for add in (True, False):
        total = before.clone()
        accumulate_(total, grad, factor=factor, add=add, backend=backend)
        want = grad.double() * factor.double() + (before.double() if add else 0)
        assert torch.allclose(total.double(), want, rtol=1e-6, atol=1e-6, equal_nan=add)
        total = before.clone()
        accumulate_(total, grad, add=add, backend=backend)
        assert torch.equal(total[1:], (before + grad if add else grad.float())[1:])


def test_other_layouts_take_pytorch():
    total, grad = torch.zeros(3, 4, device=DEVICE), torch.randn(4, 3, device=DEVICE).half().T
    accumulate_(total, grad)
    assert torch.equal(total, grad.float())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"total has shape \[2\], grad \[3\]"):
        accumulate_(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"factor has shape \[2\]; it must be one number"):
        accumulate_(torch.zeros(2), torch.zeros(2), factor=torch.zeros(2))


@pytest.mark.gpu
def test_bf16_gradients_of_many_elements():
    total, grad = torch.randn(8, 2816, 3072, device="cuda"), torch.randn(8, 2816, 3072, device="cuda").bfloat16()
    want = total + grad
    accumulate_(total, grad)
    assert torch.equal(total, want)
