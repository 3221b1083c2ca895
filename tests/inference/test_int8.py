"""`--int8`: products of integers, and models whose layers have them."""

import re
import sys

import pytest
import torch
from torch import nn

from lfm.commands import evaluate, generate
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from lfm.export.source import Source
from lfm.inference.int8 import Int8Linear, use_int8
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import continuations
from tests.export.checkpoints import TREES, VARIANTS, checkpoint_of


def by_definition(x, weight):
    """`[n, out]` in float64, from rounded rows."""

    def grid(rows):
        scale = rows.abs().amax(1, keepdim=True).double() / 127
        return (rows.double() / scale).round(), scale

    (q_x, s_x), (q_w, s_w) = grid(x), grid(weight)
    return q_x @ q_w.T * s_x * s_w.T


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (33, 7), (1, 1), (1024, 130)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_a_product_is_that_of_the_rounded_numbers(tokens, inputs, outputs):
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs, bias=False), torch.randn(tokens, inputs) * torch.logspace(-3, 3, inputs)
    y = Int8Linear(linear)(x)
    want = by_definition(x, linear.weight.detach())
    assert y.dtype == torch.float32 and (y - want).abs().max() < 1e-6 * want.abs().max()


def test_a_token_alone_is_as_beside_others_to_the_last_bit():
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(48, 64, bias=False))
    x = torch.randn(3, 5, 48) * torch.tensor([1, 1e3, 1e-3])[:, None, None]
    y = linear(x)
    assert y.shape == (3, 5, 64)
    assert all(torch.equal(y[i, t], linear(x[i, t][None])[0]) for i in range(3) for t in range(5))


def test_zeros_stay_zero_and_what_is_not_finite_shows():
    linear = Int8Linear(nn.Linear(8, 4, bias=False))
    assert torch.equal(linear(torch.zeros(2, 8)), torch.zeros(2, 4))
    for bad in (float("nan"), float("inf")):
        y = linear(torch.tensor([[1.0] * 8, [bad] + [1.0] * 7]))
        assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["to be, or not to be: that is the question. " * 20], 512, allow_smaller=True)


LINEARS = {"transformer": 2 * 4, "liquidnet": 2 * 4, "lfm": 3 * 2, "lfm_diagonal_swiglu": 3 * 4 + 2}


@pytest.mark.parametrize(("name", "linears"), LINEARS.items())
def test_logits_stay_near_whole_and_token_by_token(name, linears, tokenizer, tmp_path):
    source = Source(checkpoint_of((TREES | VARIANTS)[name], tokenizer, tmp_path / "run"))
    model = source.model(torch.float32)
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids)[0]
        use_int8(model)
        assert sum(isinstance(module, Int8Linear) for module in model.modules()) == linears
        found, _ = model(ids)
        parts, state = [], model.empty_state(2)
        for token in ids.split(1, dim=1):
            logits, state = model(token, state=state)
            parts.append(logits)
    assert 1e-4 < (found - want).norm() / want.norm() < 0.03
    assert (torch.cat(parts, dim=1) - want).norm() / want.norm() < 0.03


def test_a_model_without_such_layers_is_refused(tokenizer, tmp_path):
    model = Source(checkpoint_of(TREES["lstm"], tokenizer, tmp_path / "run")).model(torch.float32)
    with pytest.raises(UserError, match="this model of kind lstm has none; leave it out"):
        use_int8(model)
    with pytest.raises(UserError, match="the model is on meta; add --device cpu"):
        use_int8(model.to("meta"))


@pytest.fixture
def said(monkeypatch, capsys):
    """What a command printed."""

    def run(command, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lfm", *map(str, arguments), "--device", "cpu"])
        command.main()
        return capsys.readouterr().out

    return run


def test_generate_and_eval_compute_with_it_where_asked(said, text_data, tmp_path):
    tokenizer = Tokenizer.from_file(text_data / "tokenizer.json")
    run = checkpoint_of(TREES["transformer"] | {"seq_length": 64}, tokenizer, tmp_path / "run")
    of_run = ("--checkpoint", run)
    flags = (*of_run, "--prompt", "to be", "--max-new-tokens", 50)
    model = Source(run).model(torch.float32)
    use_int8(model)
    sampling = SamplingConfig(max_new_tokens=50)
    *_, (made,) = continuations(model, tokenizer, [tokenizer.encode_prompt("to be")], [sampling])
    assert said(generate, *flags, "--int8") == "to be" + made.text + "\n" != said(generate, *flags)

    flags = (*of_run, "--data", text_data, "--max-rows", 8)
    outputs = said(evaluate, *flags), said(evaluate, *flags, "--int8")
    plain, int8 = (float(re.findall(r"perplexity (\S+)", output)[0]) for output in outputs)
    assert 0 < abs(int8 - plain) < 0.02 * plain
