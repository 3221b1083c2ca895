import torch

from lfm.layers.mlp import SwiGLU, SwiGLUConfig
from lfm.models.global_names import global_views
from tests.comparison import assert_close


def test_fused_storage_computes_the_three_matrices_product_and_their_gradients():
    mlp = SwiGLU(5, SwiGLUConfig(ffn_hidden_size=7)).double()
    views = global_views(mlp, lambda _, tensor: tensor)
    w = {name: tensor.clone().requires_grad_() for name, tensor in views.items()}
    assert {name: tuple(t.shape) for name, t in w.items()} == {
        "gate.weight": (7, 5),
        "up.weight": (7, 5),
        "down.weight": (5, 7),
    }
    u = torch.randn(2, 3, 5, dtype=torch.float64)
    gate = u @ w["gate.weight"].T
    want = (gate * torch.sigmoid(gate) * (u @ w["up.weight"].T)) @ w["down.weight"].T
    got = mlp(u)
    (got**2).sum().backward()
    (want**2).sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in mlp.named_parameters()}
    assert_close(global_views(mlp, lambda name, _: gradients[name]), {n: t.grad for n, t in w.items()}, 1e-12)
