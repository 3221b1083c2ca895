import pytest
import torch
import torch.nn.functional as F

from lfm.layers import loss as loss_module
from lfm.layers.documents import IGNORED_LABEL
from lfm.layers.loss import linear_cross_entropy
from tests.comparison import assert_close


def _outputs_and_grads(fn, hidden, weight, labels):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = fn(hidden, weight, labels)
    (value * 0.37).backward()
    return {"loss": value, "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("chunk_elements", [2**24, 60])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_cross_entropy_of_the_whole_logits(dtype, bound, chunk_elements, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", chunk_elements)  # 60 elements: two tokens a chunk
    hidden, weight = torch.randn(11, 8, dtype=dtype), torch.randn(30, 8, dtype=dtype)
    labels = torch.randint(0, 30, (11,))
    labels[[0, 4, 10]] = IGNORED_LABEL

    def whole(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=IGNORED_LABEL)

    want = _outputs_and_grads(whole, hidden, weight, labels)
    assert_close(_outputs_and_grads(linear_cross_entropy, hidden, weight, labels), want, bound)


def test_rows_without_a_label_have_no_gradient():
    hidden = torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([1, IGNORED_LABEL, 2, IGNORED_LABEL, 0])
    linear_cross_entropy(hidden, torch.randn(6, 4), labels).backward()
    assert (hidden.grad[[1, 3]] == 0).all() and (hidden.grad[[0, 2, 4]] != 0).any(1).all()


def test_no_gradient_is_formed_in_evaluation():
    hidden, weight = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True)
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64))
    assert not value.requires_grad


@pytest.mark.gpu
def test_bf16_on_a_gpu_equals_float64():
    hidden, weight = torch.randn(300, 64).bfloat16(), (torch.randn(1000, 64) * 0.1).bfloat16()
    labels = torch.randint(0, 1000, (300,))
    want = _outputs_and_grads(linear_cross_entropy, hidden.double(), weight.double(), labels)
    got = _outputs_and_grads(linear_cross_entropy, hidden.cuda(), weight.cuda(), labels.cuda())
    assert_close({n: t.cpu() for n, t in got.items()}, want, 1e-2)
