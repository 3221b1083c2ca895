import pytest
import torch

from lfm.kernels.gradient_sum import GradientSum, give_sum
from lfm.kernels.lstm import lstm_stack, op
from lfm.kernels.lstm.reference import lstm_layer_reference
from tests.comparison import assert_close

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def leaves(B, T, width, H, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, width), (4 * H, width), (4 * H, H), (4 * H,), (4 * H,)]
    scales = [1.0, width**-0.5, H**-0.5, 0.5, 0.5]
    drawn = [s * torch.randn(shape, generator=generator) for shape, s in zip(shapes, scales, strict=True)]
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def lstm_layer(x, *weights_and_reset):
    """A stack of one."""
    *weights, reset = weights_and_reset if len(weights_and_reset) == 5 else (*weights_and_reset, None)
    y, h, c = lstm_stack(x, [weights], reset)
    return y, h[:, 0], c[:, 0]


def outputs_and_grads(fn, given, reset=None):
    y, h, c = fn(*given, reset)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, given, weight)
    return {"y": y.detach(), "h": h.detach(), "c": c.detach(), **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 4e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("B, T, width, H", [(1, 1, 3, 16), (3, 5, 20, 32), (17, 3, 7, 48)])
def test_the_kernels_equal_the_definition(B, T, width, H, dtype, bound):
    given = leaves(B, T, width, H, dtype)
    got = outputs_and_grads(lstm_layer, given)
    want = outputs_and_grads(lstm_layer_reference, [x.detach().double().requires_grad_() for x in given])
    assert_close(got, want, bound)


@pytest.mark.parametrize("T", [2, 6])
def test_documents_start_from_zero(T):
    given, reset = leaves(5, T, 7, 16, torch.float32), torch.zeros(5, T, dtype=torch.bool, device=DEVICE)
    reset[:, 0], reset[1, 1], reset[2], reset[4, T - 1] = True, True, True, True
    got = outputs_and_grads(lstm_layer, given, reset)
    wide = [x.detach().double().requires_grad_() for x in given]
    assert_close(got, outputs_and_grads(lstm_layer_reference, wide, reset), 2e-6)
    # The second document of row 1 is what it is alone.
    alone = lstm_layer(given[0][1:2, 1:].detach(), *given[1:])[0]
    torch.testing.assert_close(got["y"][1:2, 1:], alone.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shortest, layers", [(2, 3), (3, 2), (5, 3)])
def test_layers_take_turns_by_pieces(monkeypatch, shortest, layers, dropout):
    """A piece of an upper layer is behind that of the one below it; the last steps are a part of a piece at 5."""
    B, T, H = 3, 6, 16
    monkeypatch.setattr(op, "SHORTEST", shortest)
    x, first = leaves(B, T, 7, H, torch.float32)[0], leaves(B, T, 7, H, torch.float32)[1:]
    stack = [first, *(leaves(B, T, H, H, torch.float32)[1:] for _ in range(layers - 1))]
    reset = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    reset[1, 2] = reset[2, 5] = True
    pieces = op._num_pieces(T, layers)
    assert pieces == (T // shortest if T % shortest == 0 else 1)
    torch.manual_seed(0)
    scale = 1 / (1 - dropout)
    kept = [
        scale * op._in_rows(torch.empty(pieces, B, T // pieces, H, device=DEVICE).bernoulli_(1 - dropout))
        for _ in range(layers - 1)
    ]

    def defined(x, *flat):
        ends = []
        for i in range(layers):
            x, h, c = lstm_layer_reference(x if i == 0 else x * kept[i - 1], *flat[4 * i : 4 * i + 4], reset)
            ends.append((h, c))
        return x, *(torch.stack(part, 1) for part in zip(*ends, strict=True))

    def by_steps(x, *flat):
        torch.manual_seed(0)
        return lstm_stack(x, [flat[4 * i : 4 * i + 4] for i in range(layers)], reset, dropout=dropout)

    flat = [x, *(weight for layer in stack for weight in layer)]
    found = []
    for fn, given in ((by_steps, flat), (defined, [leaf.detach().double().requires_grad_() for leaf in flat])):
        y, h, c = fn(*given)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads = torch.autograd.grad(y, given, weight)
        found.append({"y": y.detach(), "h": h.detach(), "c": c.detach(), **{str(i): g for i, g in enumerate(grads)}})
    assert_close(*found, 4e-6)


def test_the_definition_is_torchs():
    given = leaves(3, 6, 5, 16, torch.float64)
    theirs = torch.nn.LSTM(5, 16, batch_first=True, device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), given[1:], strict=True):
            parameter.copy_(value)
    y, h, c = lstm_layer_reference(*given)
    want, (last_h, last_c) = theirs(given[0])
    for got, right in ((y, want), (h, last_h[0]), (c, last_c[0])):
        torch.testing.assert_close(got, right)


def test_weights_add_up_their_own_gradients_in_fp32():
    given = leaves(3, 5, 20, 32, torch.float16)
    want = outputs_and_grads(lstm_layer, given)
    sums = [GradientSum(torch.full(x.shape, torch.nan, device=DEVICE)) for x in given[1:]]
    for parameter, found in zip(given[1:], sums, strict=True):
        give_sum(parameter, found)
    for times in (1, 2):
        y, _, _ = lstm_layer(*given)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
        assert all(x.grad is None for x in given[1:])
        got = {name: found.total for name, found in zip(NAMES[1:], sums, strict=True)}
        assert_close(got, {name: times * want[name].double() for name in got}, 2e-3)


def test_without_dropout_no_random_number_is_drawn():
    """A comparison in the middle of a step would change what is left out in it."""
    layers = [leaves(2, 3, 16, 16, torch.float32)[1:] for _ in range(2)]
    torch.manual_seed(0)
    want = torch.rand(4, device=DEVICE)
    torch.manual_seed(0)
    lstm_stack(leaves(2, 3, 16, 16, torch.float32)[0], layers)
    assert torch.equal(torch.rand(4, device=DEVICE), want)


def test_the_last_states_carry_no_gradient():
    _, h, c = lstm_layer(*leaves(2, 3, 4, 16, torch.float32))
    assert not h.requires_grad and not c.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("B, T, width, H", [(32, 40, 4096, 1024), (70, 9, 256, 512)])
def test_bf16_on_a_gpu_equals_the_definition(B, T, width, H):
    given, reset = leaves(B, T, width, H, torch.bfloat16), torch.rand(B, T, device=DEVICE) < 0.1
    got, again = outputs_and_grads(lstm_layer, given, reset), outputs_and_grads(lstm_layer, given, reset)
    assert all(torch.equal(got[name], again[name]) for name in got)
    wide = [x.detach().float().requires_grad_() for x in given]
    assert_close(got, outputs_and_grads(lstm_layer_reference, wide, reset), 1.5e-2)


@pytest.mark.gpu
def test_layers_at_once_on_a_gpu_give_what_one_after_the_other_gives(monkeypatch):
    """To the bit, also while memory is short of what was freed."""
    B, T, H = 32, 256, 512
    layers = [leaves(1, 1, H, H, torch.bfloat16)[1:] for _ in range(4)]
    x = leaves(B, T, H, H, torch.bfloat16)[0]

    def found():
        torch.manual_seed(0)
        y, h, c = lstm_stack(x, layers, dropout=0.2)
        grads = torch.autograd.grad(y.square().sum(), [x, *(weight for layer in layers for weight in layer)])
        return [y.detach(), h, c, *grads]

    want = found()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(found(), want, strict=True))
    monkeypatch.setattr(op._Pieces, "__init__", of_one_stream)
    assert all(torch.equal(a, b) for a, b in zip(found(), want, strict=True))


def of_one_stream(self, device, layers, pieces):
    self.layers, self.pieces, self.kept, self._streams, self._done = layers, pieces, [], [], {}
