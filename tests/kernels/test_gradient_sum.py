import pytest
import torch

from lfm.kernels.gradient_sum import GradientSum, Together, give_sum
from lfm.kernels.linear import linear


def test_small_gradients_wait_for_each_other_and_are_added_as_they_came():
    together, generator = Together(), torch.Generator().manual_seed(0)
    found = [GradientSum(torch.full((n,), torch.nan), together=together) for n in (1, 5, 7)]
    alone = [GradientSum(torch.full((n,), torch.nan)) for n in (1, 5, 7)]
    for micro_batch in range(2):
        for i in (0, 2, 0, 1 + micro_batch, 0):
            gradient = torch.randn(found[i].total.shape, generator=generator).bfloat16()
            found[i].add(gradient)
            alone[i].add(gradient)
            assert found[i].waits
        together.add()
        assert not any(each.waits for each in found)
    for each, other in zip(found, alone, strict=True):
        assert torch.equal(each.total, other.total) and each.is_empty == other.is_empty


def test_what_is_large_or_has_a_factor_is_added_at_once():
    together = Together()
    large, small = (GradientSum(torch.zeros(n), together=together) for n in (Together.LARGEST + 1, 3))
    large.add(torch.ones(Together.LARGEST + 1))
    small.add(torch.ones(3), factor=torch.tensor(2.0))
    assert not large.waits and not small.waits and large.total.sum() == Together.LARGEST + 1
    assert small.total.tolist() == [2, 2, 2]


def test_a_product_comes_behind_what_waits_for_the_same_sum():
    """A weight that a product has and another operation too."""
    together, weight = Together(), torch.randn(3, 4).requires_grad_()
    want = torch.autograd.grad(((torch.ones(2, 4) @ weight.T) * weight.sum()).sum(), weight)[0]
    found = GradientSum(torch.full((3, 4), torch.nan), together=together)
    give_sum(weight, found)
    (linear(torch.ones(2, 4), weight) * weight.sum()).sum().backward()
    together.add()
    torch.testing.assert_close(found.total, want)


def test_none_is_forgotten():
    found = GradientSum(torch.zeros(2), together=Together())
    found.add(torch.ones(2))
    with pytest.raises(AssertionError, match="still waits"):
        found.finish()
