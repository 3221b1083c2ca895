import pytest
import torch
import torch.nn.functional as F

from lfm.layers.moe import MoE, MoEConfig
from lfm.layers.router import (
    LOGIT_GRID,
    Balance,
    BiasBalance,
    LossBalance,
    fixed_point,
    observe,
    route,
    router_losses,
    sampled,
)


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
    assert routing.counts.sum(0).tolist() == [0, 10, 0] and (routing.weights == 1).all()


def test_a_loss_over_the_step_takes_the_shares_it_is_given():
    logits = torch.randn(3, 9, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    found = router_losses([_route(logits, balance_over="step", shares=shares)]).balance[0]
    want = 4 * (shares.double() * logits.softmax(-1).mean(1)).sum(-1)
    assert torch.allclose(found, want, rtol=1e-14)
    (got,) = torch.autograd.grad(found.sum(), logits)
    (right,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(got, right, rtol=0, atol=1e-15)


def test_the_choices_are_counted_before_any_is_dropped():
    logits = torch.zeros(2, 8, 4)
    routing = route(logits, top_k=1, capacity_factor=1.0)
    assert routing.counts.tolist() == [[8, 0, 0, 0]] * 2 and routing.load.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("over", ["sequence", "batch", "step"])
def test_losses_of_several_layers_are_those_of_each(over):
    logits = torch.randn(3, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(3, 4) if over == "step" else [None] * 3
    layers = [_route(x, balance_over=over, shares=each) for x, each in zip(logits, shares, strict=True)]
    found = router_losses(layers)
    chosen = [F.one_hot(x.topk(2).indices, 4).sum(2).double() for x in logits]  # [B, T, E]
    for layer, (x, each) in enumerate(zip(logits, chosen, strict=True)):
        share, probability = each.mean(1) / 2, x.softmax(-1).mean(1)
        if over == "step":
            share = shares[layer].double().expand(2, 4)
        elif over == "batch":
            share, probability = (part.mean(0).expand(2, 4) for part in (share, probability))
        assert torch.allclose(found.balance[layer], 4 * (share * probability).sum(-1), rtol=1e-14)
        assert torch.allclose(found.z[layer], x.logsumexp(-1).square().mean(-1), rtol=1e-14)
    weights = torch.randn(2, 3, 2, dtype=torch.float64)
    (together,) = torch.autograd.grad((torch.stack(found) * weights).sum(), logits, retain_graph=True)
    alone = [router_losses([layer]) for layer in layers]
    summed = sum((torch.stack(each)[:, 0] * weights[:, i]).sum() for i, each in enumerate(alone))
    assert torch.allclose(together, torch.autograd.grad(summed, logits)[0], rtol=0, atol=1e-16)


def _route(logits, x=None, **how):
    routing = route(logits, top_k=min(2, logits.shape[-1]), capacity_factor=None, **how)
    routing.sample = sampled(x) if x is not None else None
    return routing


def test_what_is_observed_is_what_it_is_called():
    x, logits = torch.randn(2, 3, 7, 5, dtype=torch.float64) + 1, torch.randn(2, 3, 7, 4, dtype=torch.float64)
    found = observe([_route(*each) for each in zip(logits, x, strict=True)])
    for i in range(2):
        p = logits[i].softmax(-1)
        assert torch.allclose(found.entropy[i], -(p * p.log()).sum(-1).mean())
        pairs = [(row[a], row[b]) for row in x[i] for a in range(7) for b in range(7) if a != b]
        cosines = [F.cosine_similarity(*pair, dim=0) for pair in pairs]
        assert torch.allclose(found.input_cosine[i], torch.stack(cosines).mean())
        assert torch.equal(found.mean_logit[i], logits[i].mean(1))


@pytest.mark.parametrize("T", [512, 513, 1500])
def test_the_cosine_of_long_rows_is_of_evenly_spaced_tokens(T):
    x, step = torch.randn(1, T, 5), -(-T // 512)
    sample = sampled(x)
    assert torch.equal(sample, x[:, ::step])
    assert (sample.data_ptr() == x.data_ptr()) == (step == 1), "a sample keeps all tokens in memory"


def test_one_token_is_like_itself_and_certain_tokens_have_no_entropy():
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf]]])
    found = observe([_route(logits, torch.randn(1, 1, 5))])
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
    assert layer(torch.randn(1, 4, 12))[1].sample is not None
    with torch.no_grad():
        assert layer(torch.randn(1, 4, 12))[1].sample is None
