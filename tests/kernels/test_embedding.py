"""`embedding`, and the sum that its weight's gradient goes to."""

import pytest
import torch
import torch.nn.functional as F

from lfm.kernels.embedding import add_rows_, embedding
from lfm.layers.embedding import Embedding
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _gradients(ids, weight, grads):
    """Of micro-batches: what the weight adds up, and what autograd does in float64."""
    own, wide = summed(weight), weight.double().requires_grad_()
    for each, grad in zip(ids, grads, strict=True):
        x = embedding(each, own)
        assert torch.equal(x, F.embedding(each, weight))
        x.backward(grad)
        F.embedding(each, wide).backward(grad.double())
    return {"weight": summed_gradient(own)}, {"weight": wide.grad}


@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=str)
def test_a_weight_adds_up_the_rows_that_occur(shape):
    ids = torch.randint(0, 4, (2, *shape))
    assert_close(*_gradients(ids, torch.randn(6, 8), torch.randn(2, *shape, 8)), 1e-6)


def test_without_a_sum_it_is_torchs_embedding():
    layer, ids = Embedding(6, 8), torch.tensor([[1, 1, 5]])
    x = layer(ids)
    assert torch.equal(x, F.embedding(ids, layer.weight))
    x.sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [0, 16, 0, 0, 0, 8]


def test_what_needs_no_gradient_has_none():
    weight = summed(torch.randn(6, 8))
    with torch.no_grad():
        embedding(torch.tensor([1]), weight)
    weight.requires_grad_(False)
    assert not embedding(torch.tensor([1]), weight).requires_grad and weight.gradient_sum.is_empty


@pytest.mark.parametrize("n, V, D", [(0, 3, 4), (1, 1, 1), (40, 5, 3), (70, 30, 1100), (600, 4, 7)], ids=str)
def test_the_kernel_equals_the_definition_and_repeats_its_bits(n, V, D):
    ids, rows = torch.randint(0, V, (n,), device=DEVICE), torch.randn(n, D, device=DEVICE).half()
    before = torch.randn(V, D, device=DEVICE)
    got, again = before.clone(), before.clone()
    for total in (got, again):
        add_rows_(total, ids, rows, backend="triton")
    assert torch.equal(got, again)
    want = before.double()
    add_rows_(want, ids, rows, backend="reference")
    assert_close({"sums": got}, {"sums": want}, 1e-6)


def test_an_id_that_fills_the_batch_is_summed_too():
    ids, rows = torch.full((100,), 2, device=DEVICE), torch.ones(100, 5, device=DEVICE)
    total = torch.zeros(4, 5, device=DEVICE)
    add_rows_(total, ids, rows, backend="triton")
    assert total.sum(1).tolist() == [0, 0, 500, 0]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"ids is torch.int64 of shape \[3\], rows has \[2, 4\]"):
        add_rows_(torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [3072, 1000])
def test_bf16_rows_of_a_large_table(D):
    # As text has them: the n-th word n times as rare.
    ids = (30_000 ** torch.rand(2, 2, 8192, device="cuda")).long()
    weight, grads = (
        torch.randn(32_768, D, device="cuda").bfloat16(),
        torch.randn(2, 2, 8192, D, device="cuda").bfloat16(),
    )
    assert_close(*_gradients(ids, weight, grads), 1e-6)
