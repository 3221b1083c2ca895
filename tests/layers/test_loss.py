import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lfm.kernels.gradient_sum import gradient_sum
from lfm.layers import loss as loss_module
from lfm.layers.documents import IGNORED_LABEL
from lfm.layers.loss import VocabularyShard, linear_cross_entropy, linear_token_losses
from lfm.parallel.later import LaterProducts
from tests.comparison import assert_close
from tests.ranks import run_on_ranks
from tests.sums import summed, summed_gradient


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


def _problem(with_bias=False, dtype=torch.float64):
    """Hidden states, weight, labels, bias and weights of tokens, negative and zero ones among them."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    labels = torch.randint(0, 30, (11,), generator=generator)
    labels[[0, 4, 10]] = IGNORED_LABEL
    token_weights = draw(11).index_fill_(0, torch.tensor([2]), 0.0)
    return draw(11, 8), draw(30, 8), labels, draw(30) if with_bias else None, token_weights


def _whole_token_losses(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none", ignore_index=IGNORED_LABEL)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("chunk_elements", [2**24, 60])
def test_weights_of_tokens_multiply_losses_and_gradients(chunk_elements, with_bias, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    *inputs, token_weights = _problem(with_bias)
    want = _outputs_and_grads(lambda *a, **k: (_whole_token_losses(*a, **k) * token_weights).sum(), *inputs)
    got = _outputs_and_grads(lambda *a, **k: linear_cross_entropy(*a, token_weights=token_weights, **k), *inputs)
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("chunk_elements", [2**24, 60])
def test_losses_by_token_take_any_function_of_them(chunk_elements, with_bias, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    *inputs, _ = _problem(with_bias)
    want = _outputs_and_grads(lambda *a, **k: _whole_token_losses(*a, **k)[:7].sum().tanh(), *inputs)
    got = _outputs_and_grads(lambda *a, **k: linear_token_losses(*a, **k)[:7].sum().tanh(), *inputs)
    assert_close(got, want, 1e-12)


def test_losses_by_token_sum_to_the_cross_entropy():
    hidden, weight, labels, bias, _ = _problem(True)
    losses = linear_token_losses(hidden, weight, labels, bias=bias)
    assert (losses[labels == IGNORED_LABEL] == 0).all()
    assert_close({"sum": losses.sum()}, {"sum": linear_cross_entropy(hidden, weight, labels, bias=bias)}, 1e-14)


def _sums_of_two(fn, hidden, weight, labels, bias):
    """Gradients of two micro-batches with factors of their own, added up by weight and bias themselves."""
    weight, bias, found = summed(weight), summed(bias), {}
    for i, factor in enumerate((0.37, -1.5)):
        leaf = hidden.clone().requires_grad_()
        value = fn(leaf, weight, labels, num_classes=30, bias=bias)
        (value * factor).backward()
        found |= {f"loss{i}": value.detach(), f"hidden{i}": leaf.grad}
    return found | {"weight": summed_gradient(weight), "bias": summed_gradient(bias)}


@pytest.mark.parametrize("chunk_elements", [2**24, 60])
@pytest.mark.parametrize(
    "fn",
    [linear_cross_entropy, lambda *a, **k: linear_token_losses(*a, **k).square().sum()],
    ids=["cross entropy", "by token"],
)
def test_a_padded_weight_adds_up_its_own_gradient(fn, chunk_elements, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden, weight, labels, bias, _ = _problem(True)
    padded = torch.cat([weight, torch.full((2, 8), 1e9, dtype=weight.dtype)])
    got, want = _sums_of_two(fn, hidden, padded, labels, bias), {}
    for i, factor in enumerate((0.37, -1.5)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        losses = _whole_token_losses(leaves[0], leaves[1], labels, leaves[2])
        value = losses.sum() if fn is linear_cross_entropy else losses.square().sum()
        grads = torch.autograd.grad(value * factor, leaves)
        want |= {f"loss{i}": value.detach(), f"hidden{i}": grads[0]}
        for name, grad in zip(("weight", "bias"), grads[1:], strict=True):
            want[name] = want.get(name, 0) + grad
    assert (got["weight"][30:] == 0).all()
    got["weight"] = got["weight"][:30]
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("chunk_elements", [2**24, 60])
def test_a_weights_gradient_that_waits_is_the_same(chunk_elements, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden, weight, labels, _, token_weights = _problem(dtype=torch.float32)
    later, found = LaterProducts(), {}
    for name, kept_by in (("at once", None), ("later", later)):
        leaf, summing = hidden.clone().requires_grad_(), summed(torch.cat([weight, weight[:2]]), later=kept_by)
        for factor in (0.37, -1.5):
            value = linear_cross_entropy(leaf, summing, labels, num_classes=30, token_weights=token_weights)
            (value * factor).backward()
        if kept_by is not None:
            assert gradient_sum(summing).is_empty and len(later) == 1
            later.run()
        found[name] = [leaf.grad, summed_gradient(summing)]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_padding_has_no_gradient_without_a_sum_either():
    hidden, weight, labels, _, _ = _problem()
    padded = torch.cat([weight, torch.full((2, 8), 1e9, dtype=weight.dtype)])
    want = _outputs_and_grads(linear_cross_entropy, hidden, weight, labels)
    got = _outputs_and_grads(lambda *a: linear_cross_entropy(*a, num_classes=30), hidden, padded, labels)
    assert (got["weight"][30:] == 0).all()
    assert all(torch.equal(got[name][:30] if name == "weight" else got[name], want[name]) for name in want)


def _on_a_cut_vocabulary(rank):
    """This process's part of what a cut vocabulary computes, of a weighted sum and of a function of single losses."""
    hidden, weight, labels, _, token_weights = _problem()
    rows = 16  # of 30: the second process has two rows of padding, which it does not multiply
    padded = torch.cat([weight, torch.full((2, 8), 1e9, dtype=weight.dtype)])
    shard, own = VocabularyShard(dist.group.WORLD, rank * rows, rows), padded[rank * rows : (rank + 1) * rows]
    how = {"num_classes": (16, 14)[rank], "shard": shard}

    def weighted(*inputs):
        return linear_cross_entropy(*inputs, token_weights=token_weights, **how)

    def function(*inputs):
        return linear_token_losses(*inputs, **how)[:7].sum().tanh()

    return [
        {n: t.detach().tolist() for n, t in _outputs_and_grads(fn, hidden, own, labels).items()}
        for fn in (weighted, function)
    ]


def test_a_cut_vocabulary_gives_the_whole_ones_weighted_and_single_losses():
    hidden, weight, labels, _, token_weights = _problem()
    wants = [
        _outputs_and_grads(lambda *a: (_whole_token_losses(*a) * token_weights).sum(), hidden, weight, labels),
        _outputs_and_grads(lambda *a: _whole_token_losses(*a)[:7].sum().tanh(), hidden, weight, labels),
    ]
    ranks = run_on_ranks(_on_a_cut_vocabulary, 2)
    for number, want in enumerate(wants):
        first, second = ({n: torch.tensor(t, dtype=torch.float64) for n, t in r[number].items()} for r in ranks)
        assert torch.equal(first["loss"], second["loss"])
        got = {
            "loss": first["loss"],
            "hidden": first["hidden"] + second["hidden"],  # each has a summand
            "weight": torch.cat([first["weight"], second["weight"]])[:30],
        }
        assert_close(got, want, 1e-12)


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
def test_the_fused_head_with_weights_and_by_token_equals_float64(monkeypatch):
    # cuBLAS may add up the parts of so small a product in bf16, which is off by 6e-3 without weights too.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    hidden, weight = torch.randn(3000, 256).bfloat16().cuda(), (torch.randn(70_001, 256) / 8).bfloat16().cuda()
    labels = torch.randint(0, len(weight), (len(hidden),)).cuda()
    labels[::7] = IGNORED_LABEL
    factors = torch.randn(len(hidden)).cuda()
    for fn in (
        lambda *a: linear_cross_entropy(*a, token_weights=factors),
        lambda *a: (linear_token_losses(*a) * factors).sum(),
    ):
        got = _outputs_and_grads(fn, hidden, weight, labels)
        want = _outputs_and_grads(fn, hidden.double(), weight.double(), labels)
        scale = linear_token_losses(hidden.double(), weight.double(), labels).abs().sum()
        assert (got.pop("loss") - want.pop("loss")).abs() < 1e-4 * scale
        assert_close(got, want, 5e-3)


@pytest.mark.gpu
def test_bf16_on_a_gpu_equals_float64():
    hidden, weight = torch.randn(300, 64).bfloat16(), (torch.randn(1000, 64) * 0.1).bfloat16()
    labels = torch.randint(0, 1000, (300,))
    bias = torch.randn(1000).bfloat16()
    want = _outputs_and_grads(linear_cross_entropy, hidden.double(), weight.double(), labels, bias.double())
    got = _outputs_and_grads(linear_cross_entropy, hidden.cuda(), weight.cuda(), labels.cuda(), bias.cuda())
    assert_close({n: t.cpu() for n, t in got.items()}, want, 1e-2)
