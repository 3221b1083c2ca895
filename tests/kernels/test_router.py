import pytest
import torch

from lfm.kernels.backend import disagreement
from lfm.kernels.router import Choice, choose_experts, router_logits, row_means
from lfm.kernels.router.op import _choice_comparison
from lfm.kernels.router.reference import choose_experts_reference, router_logits_reference
from lfm.layers.router import route
from tests.comparison import assert_close
from tests.sums import summed, summed_gradient

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float16: 5e-4, torch.bfloat16: 3e-3}


def _compare_logits(shape, num_experts, dtype, bound):
    x, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(num_experts, shape[-1], device=DEVICE)
    weight, grad = weight.to(dtype), torch.randn(*shape[:-1], num_experts, device=DEVICE)
    grad_passed = torch.randn(shape, device=DEVICE).to(dtype)

    def run(linear, *leaves):
        """With the gradient of the logits alone, and with that of what is handed on besides."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y, passed = linear(*leaves)
        assert torch.equal(passed, leaves[0])
        grads = [grad.to(y.dtype), grad_passed.to(passed.dtype)]
        alone = torch.autograd.grad(y, leaves, grads[0], retain_graph=True)
        both = torch.autograd.grad([y, passed * 1], leaves, grads)
        return {"y": y, "x": alone[0], "weight": alone[1], "x of both": both[0], "weight of both": both[1]}

    got = run(lambda x, w: router_logits(x, w, backend="triton"), x, weight)
    want = run(lambda x, w: (router_logits_reference(x, w), x), x.double(), weight.double())
    assert got["y"].dtype == torch.float32 and got["x"].dtype == got["weight"].dtype == dtype
    assert_close({"y": got.pop("y")}, {"y": want.pop("y")}, bound)
    assert_close(got, want, BOUNDS[dtype])


@pytest.mark.parametrize("shape, num_experts", [((1, 1), 1), ((2, 5, 24), 8), ((70, 300), 17)], ids=str)
def test_logits_equal_the_definition(shape, num_experts):
    _compare_logits(shape, num_experts, torch.float16, 1e-6)


def test_a_weight_adds_up_its_gradient_unrounded():
    x, weight = torch.randn(70, 48, device=DEVICE).half(), torch.randn(5, 48, device=DEVICE).half()
    own, wide = summed(weight), weight.double().requires_grad_()
    for grad in torch.randn(2, 70, 5, device=DEVICE):
        router_logits(x, own, backend="triton")[0].backward(grad)
        router_logits_reference(x.double(), wide).backward(grad.double())
    assert_close({"weight": summed_gradient(own)}, {"weight": wide.grad}, 1e-5)


def test_without_a_gradient_of_the_logits_that_of_x_is_handed_through():
    x = torch.randn(3, 4, device=DEVICE).half().requires_grad_()
    _, passed = router_logits(x, torch.randn(2, 4, device=DEVICE).half().requires_grad_(), backend="triton")
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(passed, x, grad)[0], grad)


def _choice_and_grad(choose, logits, top_k):
    logits = logits.detach().requires_grad_()
    choice = Choice(*choose(logits, top_k))
    generator = torch.Generator().manual_seed(1)
    outputs = [choice.weights, *row_means(choice.means)[::2]]  # probability and z
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return choice, torch.autograd.grad(outputs, logits, grads)[0]


def _compare_choice(shape, top_k, *, biased=False):
    logits = torch.randn(shape, device=DEVICE).mul(2)
    bias = torch.randn(shape[-1], device=DEVICE).mul(4) if biased else None
    got, grad = _choice_and_grad(lambda x, k: choose_experts(x, k, bias, backend="triton"), logits, top_k)
    want, right = _choice_and_grad(lambda x, k: choose_experts_reference(x, k, bias), logits.double(), top_k)
    assert torch.equal(got.experts, want.experts) and torch.equal(got.load, want.load)
    found = {"weights": got.weights, **row_means(got.means)._asdict(), "logits": grad}
    right = {"weights": want.weights, **row_means(want.means)._asdict(), "logits": right}
    if top_k == 1:  # weights of p / p = 1 push nothing
        assert torch.equal(found.pop("weights"), torch.ones_like(got.weights)) and right.pop("weights").all()
    assert_close(found, right, 1e-5)  # fp32, through exponentials of differences up to ten


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 40, 8), (3, 700, 11)], ids=str)
def test_the_choice_equals_the_definition(shape, top_k, biased):
    _compare_choice(shape, top_k, biased=biased)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_bias_chooses_and_weighs_nothing(backend):
    logits = torch.randn(2, 30, 6, device=DEVICE)
    bias = torch.tensor([0.0, 0, 50, 0, 60, 0], device=DEVICE)
    got = choose_experts(logits, 2, bias, backend=backend)
    assert got.experts.tolist() == [[[4, 2]] * 30] * 2
    assert torch.allclose(got.weights, logits[..., [4, 2]].softmax(-1))
    assert torch.equal(got.means, choose_experts(logits, 2, backend=backend).means)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_bias_of_zero_is_none(backend):
    logits = torch.randn(2, 30, 6, device=DEVICE)
    got = choose_experts(logits, 2, torch.zeros(6, device=DEVICE), backend=backend)
    want = choose_experts(logits, 2, backend=backend)
    assert torch.equal(got.experts, want.experts) and torch.allclose(got.weights, want.weights, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_experts_whose_probabilities_round_to_zero_have_weights_and_gradients(backend):
    logits = torch.tensor([[[0.0, -201.0, -200.0, -300.0]]], device=DEVICE).requires_grad_()
    got = choose_experts(logits, 2, torch.tensor([0.0, 500, 500, 0], device=DEVICE), backend=backend)
    assert got.experts.tolist() == [[[2, 1]]] and row_means(got.means).probability[0, 1] == 0
    want = torch.tensor([1.0, 0.0], device=DEVICE).softmax(-1)
    assert torch.allclose(got.weights[0, 0], want)
    (grad,) = torch.autograd.grad(got.weights[..., 0].sum(), logits)
    assert torch.allclose(grad[0, 0, 2], want.prod()) and torch.allclose(grad[0, 0, 1], -want.prod())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_impossible_experts_have_no_part_in_the_entropy(backend):
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf], [1.0, 1.0, -torch.inf]]], device=DEVICE)
    entropy = row_means(choose_experts(logits, 1, backend=backend).means).entropy
    assert torch.allclose(entropy, torch.tensor(2.0, device=DEVICE).log() / 2)


@pytest.mark.parametrize("only", [0, 3, 7])
def test_all_tokens_on_one_expert(only):
    logits = torch.zeros(1, 50, 8, device=DEVICE)
    logits[..., only] = 90.0
    got = choose_experts(logits, 1, backend="triton")
    assert got.load.tolist() == [[50 * (e == only) for e in range(8)]]
    means = row_means(got.means)
    assert torch.allclose(means.z, torch.tensor(8100.0, device=DEVICE)) and means.probability[0, only] == 1
    assert (means.entropy < 1e-30).all() and means.logit[0, only] == 90


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_equal_logits_the_first_experts_win(backend):
    inf, nan = float("inf"), float("nan")
    rows = [[0.0] * 6, [1, 2, 0, 2, 1, 2], [-inf, -inf, 3, -inf, -inf, -inf], [0, 5, nan, 5, nan, 5]]
    logits = torch.tensor([rows], device=DEVICE)
    chosen = choose_experts(logits, 4, backend=backend).experts
    assert chosen.tolist() == [[[0, 1, 2, 3], [1, 3, 5, 0], [2, 0, 1, 3], [2, 4, 1, 3]]]
    bias = torch.tensor([0.0, 0, 0, 0, 0, 9], device=DEVICE)
    chosen = choose_experts(logits, 4, bias, backend=backend).experts
    assert chosen.tolist() == [[[5, 0, 1, 2], [5, 1, 3, 0], [2, 0, 1, 3], [2, 4, 5, 1]]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_logits_whose_probabilities_round_to_one_number_are_told_apart(backend):
    logits = torch.tensor([[[0.0, -200.0, -150.0, -300.0], [1.0, 1.0 + 2**-23, 1.0, 1.0 + 2**-23]]], device=DEVICE)
    assert choose_experts(logits, 3, backend=backend).experts.tolist() == [[[0, 2, 1], [1, 3, 0]]]


def test_padding_and_zero_rows_are_routed_to_the_first_experts():
    x, weight = torch.zeros(1, 3, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    routing = route(router_logits(x, weight, backend="reference")[0], top_k=2, capacity_factor=None)
    assert routing.experts.tolist() == [[0, 1]] * 3


def test_a_nan_is_sent_to_an_expert_that_exists():
    logits = torch.full((1, 33, 5), float("nan"), device=DEVICE)
    got = choose_experts(logits, 2, backend="triton")
    assert got.experts.tolist() == [[[0, 1]] * 33] and got.load.tolist() == [[33, 33, 0, 0, 0]]
    assert row_means(got.means).z.isnan().all() and got.weights.isnan().all()


def test_a_row_is_routed_alike_in_any_batch():
    logits = torch.randn(3, 70, 8, device=DEVICE)
    together = choose_experts(logits, 2, backend="triton")
    alone = choose_experts(logits[1:2], 2, backend="triton")
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight must be \[E, 3\]"):
        router_logits(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="top_k=9"):
        choose_experts(torch.zeros(1, 2, 8), 9)
    with pytest.raises(ValueError, match=r"bias has shape \[1, 8\]; logits of 8 experts take \[8\]"):
        choose_experts(torch.zeros(1, 2, 8), 2, torch.zeros(1, 8))


def test_the_kernels_agree_with_the_definition_by_their_own_comparison():
    assert disagreement(_choice_comparison, torch.device(DEVICE), torch.float32, 6, 2) is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape, num_experts", [((8192, 3072), 8), ((2, 1001, 1000), 64)], ids=str)
def test_large_logits_equal_float64(shape, num_experts):
    # Nothing of the operands is lost; tensor cores cut the last bits of every partial sum off, over 3,072 of them.
    _compare_logits(shape, num_experts, torch.bfloat16, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 8192, 8), (4, 2048, 64)], ids=str)
def test_large_choices_equal_float64(shape, biased):
    _compare_choice(shape, 2, biased=biased)


@pytest.mark.gpu
def test_both_have_the_same_bits_twice():
    x, weight = torch.randn(4096, 512, device="cuda").bfloat16(), torch.randn(8, 512, device="cuda").bfloat16()
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def run():
        logits, _ = router_logits(x, weight, backend="triton")
        choice = choose_experts(logits[None], 2, backend="triton")
        means = row_means(choice.means)
        loss = choice.weights[..., 0].sum() + (means.probability**2).sum() + means.z.sum()
        return (*choice, *torch.autograd.grad(loss, (x, weight)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
