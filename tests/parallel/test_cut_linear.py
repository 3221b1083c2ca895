"""Linears and embedding of two processes against whole ones, in rows that do not end where a share does."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import check_layout
from lfm.models.registry import parse
from lfm.parallel.cut_linear import column_linear, row_linear
from lfm.parallel.megatron import MegatronParts, transformer_config
from tests.comparison import assert_close
from tests.nested import nested
from tests.parallel.engine_numbers import join
from tests.ranks import run_on_ranks
from tests.sums import summed, summed_gradient

B, T, D, INNER = 3, 4, 8, 6  # a share of two is a row and a half


def _problem(dtype):
    """Inputs and output gradients of two micro-batches, a column's weight and bias, a row's weight."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return [(draw(B, T, D), draw(B, T, D)) for _ in range(2)], draw(INNER, D), draw(INNER), draw(D, INNER)


def _whole(dtype):
    micro_batches, *parameters = _problem(dtype)
    up, bias, down = (p.double().requires_grad_() for p in parameters)
    found = {}
    for i, (x, grad) in enumerate(micro_batches):
        x = x.double().requires_grad_()
        y = F.linear(F.linear(x, up, bias).tanh(), down)
        y.backward(grad.double())
        found |= {f"y{i}": y.detach(), f"x{i}": x.grad}
    return found | {"up": up.grad, "bias": bias.grad, "down": down.grad}


def _share(rank, x):
    return x.flatten(0, 1).chunk(2)[rank].reshape(B, -1, D)


def _cut(rank, dtype, adds_up):
    micro_batches, *parameters = _problem(dtype)
    half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
    up, bias, down = (p[half] if p is not parameters[2] else p[:, half].contiguous() for p in parameters)
    up, bias, down = (summed(p) if adds_up else p.clone().requires_grad_() for p in (up, bias, down))
    found = {}
    for i, (x, grad) in enumerate(micro_batches):
        x = _share(rank, x).clone().requires_grad_()
        inner = column_linear(x, up, bias, dist.group.WORLD)
        assert inner.shape == (B, T, INNER // 2)
        y = row_linear(inner.tanh(), down, dist.group.WORLD)
        y.backward(_share(rank, grad))
        found |= {f"y{i}": y.detach(), f"x{i}": x.grad}
    grads = [summed_gradient(p) if adds_up else p.grad for p in (up, bias, down)]
    found |= dict(zip(("up", "bias", "down"), grads, strict=True))
    return {name: tensor.double().tolist() for name, tensor in found.items()}


def _joined(first, second):
    first, second = ({n: torch.tensor(t, dtype=torch.float64) for n, t in part.items()} for part in (first, second))
    found = {}
    for name in first:
        if name[0] in "xy":
            flat = torch.cat([first[name].flatten(0, 1), second[name].flatten(0, 1)])
            found[name] = flat.view(B, T, D)
        else:
            found[name] = torch.cat([first[name], second[name]], 1 if name == "down" else 0)
    return found


@pytest.mark.parametrize("adds_up", [False, True], ids=["autograd", "sums"])
def test_two_processes_compute_what_one_computes(adds_up):
    got = _joined(*run_on_ranks(_cut, 2, torch.float64, adds_up))
    assert_close(got, _whole(torch.float64), 1e-13)


def _one_column(rank):
    """The weight's gradient in its sum, from tokens and gradients in bf16."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(2, 64, 8, generator=generator).bfloat16() for _ in range(2))
    weight = summed(torch.randn(8, 8, generator=generator).bfloat16())
    share = x.flatten(0, 1).chunk(2)[rank].view(2, 32, 8).requires_grad_()
    column_linear(share, weight, None, dist.group.WORLD).backward(grad)
    want = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    return float((summed_gradient(weight).double() - want).norm() / want.norm())


def test_a_narrow_weights_gradient_is_never_rounded():
    assert max(run_on_ranks(_one_column, 2)) < 1e-6  # bf16 alone is off by 2e-3


def _frozen(rank):
    x, weight = torch.ones(1, 2, 4, requires_grad=True), torch.ones(3, 4)
    column_linear(x, weight, None, dist.group.WORLD).sum().backward()
    fixed, own = torch.ones(1, 2, 4), torch.ones(3, 4, requires_grad=True)
    column_linear(fixed, own, None, dist.group.WORLD).sum().backward()
    row_linear(torch.ones(1, 4, 3), own.T.detach().requires_grad_(), dist.group.WORLD).sum().backward()
    return x.grad.unique().tolist(), weight.grad, fixed.grad, own.grad.unique().tolist()


def test_what_is_not_trained_has_no_gradient():
    # Of x: the sum over both processes' three columns.
    assert run_on_ranks(_frozen, 2) == [([6.0], None, None, [4.0])] * 2


IDS = torch.tensor([[0, 5, 63, 64], [64, 64, 127, 0], [1, 100, 5, 126]])  # of two shards of 64 rows


def _embedding(process):
    sizes = {"hidden_size": D, "seq_length": T, "vocab_size": 128, "num_layers": 1}
    heads = {"ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2}
    model = parse({"kind": "transformer", **sizes, **nested(**heads)}, source="a test")
    parallel = ParallelConfig(tensor=2, sequence_parallel=True, zero_stage=1)
    layout = check_layout(model, parallel, 2, global_batch_size=B, micro_batch_size=B)
    groups = join(process, layout)
    parts = MegatronParts(groups, transformer_config(model, layout, torch.float64))
    embedding = parts.vocabulary_embedding(128, D)
    weight = torch.arange(128.0 * D, dtype=torch.float64).view(128, D)
    embedding.weight = torch.nn.Parameter(weight.chunk(2)[process.rank].clone())
    leaf = summed(embedding.weight)
    embedding.weight.gradient_sum = leaf.gradient_sum
    x = embedding(IDS)
    assert x.shape == (B, T // 2, D)
    (x * (1 + process.rank)).sum().backward()
    assert embedding.weight.grad is None
    return {"x": x.detach().numpy(), "weight": summed_gradient(leaf).numpy()}


def test_a_cut_embedding_gives_shares_and_adds_up_its_rows():
    first, second = run_ranks(_embedding, 2, timeout_seconds=60)
    weight = torch.arange(128.0 * D, dtype=torch.float64).view(128, D).requires_grad_()
    x = F.embedding(IDS, weight).flatten(0, 1)
    (x * torch.tensor([1.0, 2.0]).repeat_interleave(B * T // 2)[:, None]).sum().backward()
    assert torch.equal(torch.cat([torch.from_numpy(part["x"]) for part in (first, second)]).flatten(0, 1), x)
    assert torch.equal(torch.cat([torch.from_numpy(part["weight"]) for part in (first, second)]), weight.grad)
