import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lfm.layers import loss as loss_module
from lfm.layers.documents import IGNORED_LABEL
from lfm.layers.loss import VocabularyShard, linear_cross_entropy
from tests.comparison import assert_close


def _outputs_and_grads(fn, hidden, weight, labels, bias=None):
    named = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}
    named = {name: tensor.clone().requires_grad_() for name, tensor in named.items()}
    value = fn(named["hidden"], named["weight"], labels, **({} if bias is None else {"bias": named["bias"]}))
    (value * 0.37).backward()
    return {"loss": value, **{name: tensor.grad for name, tensor in named.items()}}


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("chunk_elements", [2**24, 60])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_cross_entropy_of_the_whole_logits(dtype, bound, chunk_elements, with_bias, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)  # 60 elements: two tokens a chunk
    hidden, weight = torch.randn(11, 8, dtype=dtype), torch.randn(30, 8, dtype=dtype)
    bias = torch.randn(30, dtype=dtype) if with_bias else None
    labels = torch.randint(0, 30, (11,))
    labels[[0, 4, 10]] = IGNORED_LABEL

    def whole(hidden, weight, labels, bias=None):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum", ignore_index=IGNORED_LABEL)

    want = _outputs_and_grads(whole, hidden, weight, labels, bias)
    assert_close(_outputs_and_grads(linear_cross_entropy, hidden, weight, labels, bias), want, bound)


def test_a_bias_alone_is_trained():
    bias = torch.zeros(6, requires_grad=True)
    linear_cross_entropy(torch.randn(5, 4), torch.randn(6, 4), torch.zeros(5, dtype=torch.int64), bias=bias).backward()
    assert bias.grad[0] < 0 < bias.grad[1:].min()


def test_a_bias_of_a_cut_vocabulary_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        shard = VocabularyShard(dist.group.WORLD, 0, 6)
        with pytest.raises(ValueError, match="leave out bias or shard"):
            linear_cross_entropy(
                torch.randn(1, 4), torch.randn(6, 4), torch.tensor([1]), bias=torch.zeros(6), shard=shard
            )
    finally:
        dist.destroy_process_group()


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


def test_a_narrow_gradient_is_scaled_by_the_whole_factor():
    """0.37 in bf16 is 0.3691: rounded first, it would make every gradient 0.2 % too small."""
    hidden, weight, labels = torch.randn(64, 8).bfloat16(), torch.randn(30, 8).bfloat16(), torch.arange(64) % 30
    got = _outputs_and_grads(linear_cross_entropy, hidden, weight, labels)
    want = _outputs_and_grads(linear_cross_entropy, hidden.double(), weight.double(), labels)
    for name in ("hidden", "weight"):
        projection = (got[name].double() * want[name]).sum() / want[name].square().sum()
        assert abs(projection - 1) < 1e-3, name


@pytest.mark.gpu
def test_the_fused_head_equals_float64():
    """Logits of a trained head's spread, in several chunks, in a vocabulary that no tile divides."""
    hidden, weight = torch.randn(9000, 256).bfloat16().cuda(), (torch.randn(70_001, 256) / 8).bfloat16().cuda()
    labels = torch.randint(0, len(weight), (len(hidden),)).cuda()
    labels[::7] = IGNORED_LABEL
    got = _outputs_and_grads(linear_cross_entropy, hidden, weight, labels)
    assert all(
        torch.equal(again, got[name])
        for name, again in _outputs_and_grads(linear_cross_entropy, hidden, weight, labels).items()
    )
    want = _outputs_and_grads(linear_cross_entropy, hidden.double(), weight.double(), labels)
    assert_close({"loss": got.pop("loss")}, {"loss": want.pop("loss")}, 1e-4)
    assert_close(got, want, 5e-3)


@pytest.mark.gpu
def test_bf16_on_a_gpu_equals_float64():
    hidden, weight = torch.randn(300, 64).bfloat16(), (torch.randn(1000, 64) * 0.1).bfloat16()
    labels = torch.randint(0, 1000, (300,))
    bias = torch.randn(1000).bfloat16()
    want = _outputs_and_grads(linear_cross_entropy, hidden.double(), weight.double(), labels, bias.double())
    got = _outputs_and_grads(linear_cross_entropy, hidden.cuda(), weight.cuda(), labels.cuda(), bias.cuda())
    assert_close({n: t.cpu() for n, t in got.items()}, want, 1e-2)
