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


def test_other_layouts_take_pytorch():
    total, grad = torch.zeros(3, 4, device=DEVICE), torch.randn(4, 3, device=DEVICE).half().T
    accumulate_(total, grad)
    assert torch.equal(total, grad.float())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"total has shape \[2\], grad \[3\]"):
        accumulate_(torch.zeros(2), torch.zeros(3))


@pytest.mark.gpu
def test_bf16_gradients_of_many_elements():
    total, grad = torch.randn(8, 2816, 3072, device="cuda"), torch.randn(8, 2816, 3072, device="cuda").bfloat16()
    want = total + grad
    accumulate_(total, grad)
    assert torch.equal(total, want)
