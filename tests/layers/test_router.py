import pytest
import torch
import torch.nn.functional as F

from lfm.layers.moe import MoE, MoEConfig
from lfm.layers.router import LOGIT_GRID, Balance, BiasBalance, LossBalance, fixed_point, observe, route


def _buffers(config) -> set[str]:
    return {name for name, _ in Balance(4, config).named_buffers()}


@pytest.mark.parametrize(
    "config, names",
    [
        (LossBalance(), set()),
        (LossBalance(scope="batch"), set()),
        (LossBalance(scope="step"), {"shares"}),
        (BiasBalance(), {"drift", "mean"}),
        (BiasBalance(mean_decay=None), {"drift"}),
        (BiasBalance(coeff=0.1, scope="step"), {"drift", "mean", "shares"}),
    ],
)
def test_a_balance_keeps_what_its_kind_needs(config, names):
    assert _buffers(config) == names
    assert set(Balance(4, config).stored()) == names


def test_before_the_first_step_there_is_no_bias_and_shares_are_equal():
    balance = Balance(4, BiasBalance(coeff=0.1, scope="step"))
    assert balance.bias().tolist() == [0.0] * 4 and balance.shares.tolist() == [0.25] * 4


def test_the_bias_is_drift_less_mean():
    balance = Balance(3, BiasBalance())
    balance.drift.copy_(torch.tensor([0.5, 0, 1]))
    balance.mean.copy_(torch.tensor([0.25, 1, 0]))
    assert balance.bias().tolist() == [0.25, -1, 1]


def test_an_expert_of_small_logits_is_chosen_by_its_bias_and_weighed_as_it_is():
    layer = MoE(12, MoEConfig(num_moe_experts=3, moe_ffn_hidden_size=8, moe_router_topk=1, balance=BiasBalance()))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.balance.drift.copy_(torch.tensor([0.0, 1e4, 0]))
    _, routing = layer(torch.randn(2, 5, 12))
    assert routing.chosen.tolist() == [0, 10, 0] and (routing.weights == 1).all()


def test_a_loss_over_the_step_takes_the_shares_it_is_given():
    logits = torch.randn(3, 9, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    found = route(logits, top_k=2, capacity_factor=None, balance_over="step", shares=shares).balance_loss
    want = 4 * (shares.double() * logits.softmax(-1).mean(1)).sum(-1)
    assert torch.allclose(found, want, rtol=1e-14)
    (got,) = torch.autograd.grad(found.sum(), logits)
    (right,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(got, right, rtol=0, atol=1e-15)


def test_the_choices_are_counted_before_any_is_dropped():
    logits = torch.zeros(2, 8, 4)
    routing = route(logits, top_k=1, capacity_factor=1.0)
    assert routing.chosen.tolist() == [16, 0, 0, 0] and routing.load.tolist() == [4, 0, 0, 0]


def test_what_is_observed_is_what_it_is_called():
    x, logits = torch.randn(3, 7, 5, dtype=torch.float64) + 1, torch.randn(3, 7, 4, dtype=torch.float64)
    found = observe(x, logits, mean_logit=True)
    p = logits.softmax(-1)
    assert torch.allclose(found.entropy, -(p * p.log()).sum(-1).mean())
    cosines = [F.cosine_similarity(row[i], row[j], dim=0) for row in x for i in range(7) for j in range(7) if i != j]
    assert torch.allclose(found.input_cosine, torch.stack(cosines).mean())
    assert torch.equal(found.mean_logit, logits.mean(1))


@pytest.mark.parametrize("T", [512, 513, 1500])
def test_the_cosine_of_long_rows_is_of_evenly_spaced_tokens(T):
    x, logits = torch.randn(1, T, 5), torch.randn(1, T, 4)
    step = -(-T // 512)
    assert torch.equal(
        observe(x, logits, mean_logit=False).input_cosine, observe(x[:, ::step], logits, mean_logit=False).input_cosine
    )
    if step > 1:  # the others have no part in it
        x[:, 1::step] = torch.inf
        assert observe(x, logits, mean_logit=False).input_cosine.isfinite()


def test_one_token_is_like_itself_and_certain_tokens_have_no_entropy():
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf]]])
    found = observe(torch.randn(1, 1, 5), logits, mean_logit=False)
    assert found.input_cosine == 1 and found.entropy == 0


def test_sums_of_logits_are_the_same_in_any_order():
    mean = torch.randn(64, 5) * 3
    whole = fixed_point(mean, 100)
    parts = [fixed_point(part, 100) for part in mean[torch.randperm(64)].split([1, 40, 23])]
    assert torch.equal(whole, torch.stack(parts).sum(0))
    assert torch.allclose(whole * LOGIT_GRID / 6400, mean.mean(0), rtol=0, atol=LOGIT_GRID)


def test_without_a_backward_pass_nothing_is_observed():
    layer = MoE(12, MoEConfig(num_moe_experts=3, moe_ffn_hidden_size=8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert layer(torch.randn(1, 4, 12))[1].observed is not None
    with torch.no_grad():
        assert layer(torch.randn(1, 4, 12))[1].observed is None
