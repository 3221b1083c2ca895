import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lfm.layers.documents import Documents
from lfm.layers.lstm import StackedLSTM, lstm_cost, pack_documents
from tests.comparison import assert_close


def pair(dtype=torch.float64, *, dropout=0.0):
    """Torch's LSTM and ours with its weights."""
    truth = nn.LSTM(5, 7, num_layers=3, batch_first=True, dtype=dtype)
    ours = StackedLSTM(5, 7, num_layers=3, dropout=dropout).to(dtype)
    ours.load_state_dict(truth.state_dict())
    return ours, truth


def outputs_and_grads(run, module, x, state):
    inputs = [x.clone().requires_grad_(), *(part.clone().requires_grad_() for part in state)]
    module.zero_grad()
    y, (h, c) = run(module, *inputs)
    (y.square().sum() + (h * c).sum()).backward()
    named = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {
        "y": y,
        "h": h,
        "c": c,
        **dict(zip(("x", "h0", "c0"), (part.grad for part in inputs), strict=False)),
        **named,
    }


@pytest.mark.parametrize("tokens", [9, 1])
def test_equals_torch_lstm_with_every_gradient(tokens):
    ours, truth = pair()
    x, state = torch.randn(2, tokens, 5, dtype=torch.float64), torch.randn(2, 2, 3, 7, dtype=torch.float64).unbind(0)

    def run_truth(module, x, h, c):
        y, (h, c) = module(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return y, (h.transpose(0, 1), c.transpose(0, 1))

    want = outputs_and_grads(run_truth, truth, x, state)
    got = outputs_and_grads(lambda module, x, h, c: module(x, state=(h, c)), ours, x, state)
    assert_close(got, want, 1e-12)
    assert sum(parameter.numel() for parameter in ours.parameters()) == (
        lstm_cost(5, 7).trainable + 2 * lstm_cost(7, 7).trainable
    )


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sets(st.integers(1, 11), max_size=5), min_size=1, max_size=3))
def test_packed_documents_equal_the_documents_alone(cuts):
    ours, _ = pair()
    rows = [[*sorted(row), 12] for row in cuts]
    lengths = [[stop - start for start, stop in itertools.pairwise([0, *row])] for row in rows]
    x = torch.randn(len(rows), 12, 5, dtype=torch.float64)
    y, (h, c) = ours(x, documents=Documents.from_lengths(lengths, "cpu"))
    for b, row in enumerate(rows):
        for start, stop in itertools.pairwise([0, *row]):
            alone, last = ours(x[b : b + 1, start:stop])
            assert torch.allclose(y[b, start:stop], alone[0], atol=1e-14)
        assert torch.allclose(h[b], last[0][0], atol=1e-14) and torch.allclose(c[b], last[1][0], atol=1e-14)


def test_packing_puts_the_longest_document_first_and_pads_nothing():
    tokens, sizes, last = pack_documents(((2, 3), (4, 1)), torch.device("cpu"))
    assert tokens.tolist() == [5, 2, 0, 9, 6, 3, 1, 7, 4, 8]
    assert sizes.tolist() == [4, 3, 2, 1]
    assert last.tolist() == [1, 3]


def test_dropout_is_between_layers_and_follows_the_seed():
    ours, truth = pair(dropout=0.5)
    layers = [nn.LSTM(5 if layer == 0 else 7, 7, batch_first=True, dtype=torch.float64) for layer in range(3)]
    for number, layer in enumerate(layers):
        layer.load_state_dict({name: truth.get_parameter(f"{name[:-1]}{number}") for name in layer.state_dict()})
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    torch.manual_seed(1)
    got, _ = ours(x)
    torch.manual_seed(1)
    y, _ = layers[0](x)
    for layer in layers[1:]:
        y, _ = layer(F.dropout(y, 0.5))
    assert torch.allclose(got, y, atol=1e-14)
    assert not torch.equal(ours(x)[0], got)
    assert torch.allclose(ours.eval()(x)[0], truth(x)[0], atol=1e-14)


def test_bf16_weights_run_in_fp32():
    ours, _ = pair(torch.float32)
    ours = ours.bfloat16()
    x = torch.randn(2, 9, 5).bfloat16()
    y, (h, c) = ours(x)
    exact = ours.float()
    want, (want_h, want_c) = exact(x.float())
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())
    assert h.dtype == c.dtype == torch.float32 and torch.equal(h, want_h) and torch.equal(c, want_c)


@pytest.mark.parametrize("lengths", [[[9]] * 3, [[9], [2, 7], [1] * 9]], ids=["whole", "packed"])
def test_steps_are_the_librarys(lengths):
    ours, like = (StackedLSTM(5, 16, num_layers=2, dropout=0.0) for _ in range(2))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            like.get_parameter(name).copy_(parameter.normal_(0, 0.3))
    like.backend, x = "steps", torch.randn(3, 9, 5)
    found = []
    for module in (ours, like):
        leaf = x.clone().requires_grad_()
        y, (h, c) = module(leaf, documents=Documents.from_lengths(lengths, "cpu"))
        y.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({"y": y.detach(), "h": h.detach(), "c": c.detach(), "x": leaf.grad, **grads})
    assert_close(found[1], found[0], 2e-6)
    like.dropout = 0.4
    assert not torch.equal(like(x)[0], like(x)[0])
    # From a state there are none.
    state = (torch.randn(3, 2, 16), torch.randn(3, 2, 16))
    assert torch.equal(like.eval()(x, state=state)[0], ours.eval()(x, state=state)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[[40], [40]], [[40], [3, 37]]], ids=["whole", "packed"])
def test_a_gpu_equals_the_cpu(lengths):
    ours, _ = pair()
    x, state = torch.randn(2, 40, 5), ()

    def run(module, x):
        return module(x, documents=Documents.from_lengths(lengths, x.device))

    want = outputs_and_grads(run, ours, x.double(), state)
    got = outputs_and_grads(run, ours.float().cuda(), x.cuda(), state)
    assert_close({name: tensor.cpu() for name, tensor in got.items()}, want, 5e-3)  # cuDNN multiplies in TF32
