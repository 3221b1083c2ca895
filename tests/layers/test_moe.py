import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.layers.moe import MoE, MoEConfig
from lfm.layers.router import route, router_losses
from tests.comparison import assert_close


def _layer(**changes):
    layer = MoE(12, MoEConfig(**({"num_moe_experts": 4, "moe_ffn_hidden_size": 10} | changes))).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def _token_by_token(layer, x):
    """The equation, one token and one expert at a time."""
    width = layer.down.shape[2]
    rows = []
    for u in x.flatten(0, 1):
        probabilities = (layer.router.weight @ u).softmax(0)
        top, experts = probabilities.topk(layer.top_k)
        y = torch.zeros_like(u)
        for w, e in zip(top / top.sum(), experts, strict=True):
            gate, up = layer.gate_up[e][:width], layer.gate_up[e][width:]
            y = y + w * (layer.down[e] @ (F.silu(gate @ u) * (up @ u)))
        rows.append(y)
    return torch.stack(rows).view_as(x)


def _outputs_and_grads(forward, layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y, "x": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 1), (2, 2), (5, 3)])
def test_grouped_experts_equal_token_by_token(experts, top_k):
    layer, x = _layer(num_moe_experts=experts, moe_router_topk=top_k), torch.randn(2, 7, 12, dtype=torch.float64)
    want = _outputs_and_grads(lambda x: _token_by_token(layer, x), layer, x)
    got = _outputs_and_grads(lambda x: layer(x)[0], layer, x)
    if top_k == 1:  # the weight is p / p = 1: no gradient reaches the router, only rounding
        assert got.pop("router.weight").norm() < 1e-12 and want.pop("router.weight").norm() < 1e-12
    assert_close(got, want, 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(2, 6), st.integers(0, 10**6))
def test_every_token_has_top_k_experts_and_weights_sum_to_one(B, T, E, seed):
    logits = torch.randn(B, T, E, generator=torch.Generator().manual_seed(seed))
    routing = route(logits, top_k=2, capacity_factor=None)
    assert routing.load.sum() == 2 * B * T
    assert (routing.experts[:, 0] != routing.experts[:, 1]).all()
    assert torch.allclose(routing.weights.sum(-1), torch.ones(B * T))


def _losses(logits):
    return router_losses([route(logits, top_k=2, capacity_factor=None)])


def test_uniform_routing_has_balance_loss_one():
    # Token t prefers experts 2t and 2t+1 (mod 8) by a hair: equal counts, equal probabilities.
    logits = torch.zeros(3, 64, 8, dtype=torch.float64)
    for t in range(64):
        logits[:, t, [2 * t % 8, (2 * t + 1) % 8]] = 1e-9
    assert torch.allclose(_losses(logits).balance, torch.ones(3, dtype=torch.float64))


def test_collapsed_routing_has_the_largest_balance_loss():
    logits = torch.zeros(1, 16, 8)
    logits[..., :2] = 30.0
    assert math.isclose(_losses(logits).balance.item(), 4.0, rel_tol=1e-4)


def test_z_loss_is_the_squared_log_normalizer():
    logits = torch.randn(2, 5, 4)
    want = logits.exp().sum(-1).log().square().mean(-1)
    assert torch.allclose(_losses(logits).z, want)


def test_balance_loss_does_not_depend_on_the_other_rows():
    logits = torch.randn(4, 9, 4)
    together = _losses(logits).balance
    alone = torch.cat([_losses(logits[b : b + 1]).balance for b in range(4)], dim=1)
    assert torch.equal(together, alone)


def test_capacity_drops_late_tokens_and_their_contribution_is_zero():
    layer = _layer(num_moe_experts=2, moe_router_topk=1, moe_capacity_factor=1.0).train()
    x = torch.randn(1, 1, 12, dtype=torch.float64).expand(1, 6, 12).contiguous()  # all want one expert; capacity is 3
    y, routing = layer(x)
    assert routing.load.sum() == 3
    assert (y[0, :3] != 0).all() and (y[0, 3:] == 0).all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_capacity_is_causal_and_per_row():
    layer = _layer(moe_capacity_factor=0.6).train()
    x = torch.randn(3, 10, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] = torch.randn(3, 3, 12, dtype=torch.float64)
    assert torch.allclose(layer(x)[0][:, :7], layer(changed)[0][:, :7], atol=1e-12)
    assert torch.allclose(layer(x)[0][1:2], layer(x[1:2])[0])


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none():
    layer, x = _layer(num_moe_experts=3, moe_router_topk=1), torch.randn(1, 1, 12, dtype=torch.float64)
    layer(x)[0].sum().backward()
    for parameter in (layer.gate_up, layer.down):
        assert sorted((parameter.grad[e] != 0).any().item() for e in range(3)) == [False, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("preferred", [{}, {2: -9.0}, {1: 9.0, 3: 9.0}], ids=["random", "one without", "all on two"])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_grouped_matmul_equals_the_loop(capacity_factor, preferred):
    config = MoEConfig(num_moe_experts=4, moe_ffn_hidden_size=128, moe_capacity_factor=capacity_factor)
    layer = MoE(64, config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for expert, score in preferred.items():
        layer.router.weight.data[expert, 0] = score
    fast = MoE(64, config)
    fast = fast.to("cuda", torch.bfloat16)
    fast.load_state_dict(layer.state_dict())
    layer.load_state_dict({n: t.float().cpu() for n, t in fast.state_dict().items()})
    x = torch.randn(2, 50, 64).bfloat16()
    x[..., 0] = 1

    def run(layer, x):
        x = x.clone().requires_grad_()
        y = layer(x)[0]
        y.backward(torch.ones_like(y))
        return {"y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if n != "router.weight"}}

    got = {n: t.cpu() for n, t in run(fast, x.cuda()).items()}
    assert_close(got, run(layer, x.float()), 2e-2)
