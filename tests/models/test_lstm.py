import pytest
import torch
import torch.nn.functional as F

from lfm.layers.documents import Documents
from lfm.models.initialization import initialize
from lfm.models.lstm import LSTM, LSTMConfig
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models.reference_lstm import document_forward


def small_model(dtype=torch.float64, **changes) -> LSTM:
    tree = {"hidden_size": 12, "num_layers": 3, "seq_length": 32, "vocab_size": 40}
    model = LSTM(LSTMConfig.model_validate(tree | changes))
    initialize(model, seed=3)
    model.final_norm.weight.data += 0.1 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    return model.to(dtype).eval()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_logits_loss_and_every_gradient_equal_the_equations(num_layers):
    model = small_model(num_layers=num_layers)
    ids, lengths = torch.randint(0, 40, (2, 11)), [[11], [5, 1, 5]]
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    pieces = [
        document_forward(weights, model.config, document)
        for row, row_lengths in zip(ids, lengths, strict=True)
        for document in row.split(row_lengths)
    ]
    logits, _ = model(ids, doc_lengths=lengths)
    assert relative_error(logits.flatten(0, 1), torch.cat(pieces)) < 1e-12

    documents = Documents.from_lengths(lengths, "cpu")
    loss = cross_entropy(model, ids, documents)
    loss.backward()
    labels = documents.labels(ids).flatten()
    want_loss = F.cross_entropy(torch.cat(pieces), labels, reduction="sum", ignore_index=-100)
    want_loss.backward()
    assert torch.allclose(loss, want_loss, rtol=1e-12)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(got, {name: weights[name].grad for name in got}, 1e-9)


def test_counts_equal_the_built_model():
    config = LSTMConfig(hidden_size=12, num_layers=3, vocab_size=40)
    with torch.device("meta"):
        model = LSTM(config)
    counts = config.count_parameters()
    assert counts.total == counts.trainable == sum(p.numel() for p in model.parameters())
    assert counts.total - counts.active_non_embedding == model.embedding.weight.numel()
    assert config.flops_per_token() == 6 * (3 * 48 * 24 + 40 * 12)


def test_dropout_is_on_every_layers_output_while_training():
    model = small_model(hidden_dropout=0.999999, num_layers=2).train()
    logits, state = model(torch.randint(0, 40, (1, 9)))
    assert (logits == 0).all()
    # The second layer reads zeros: its first state does not depend on the token.
    _, other = model(torch.randint(0, 40, (1, 9)))
    assert torch.equal(state.h[:, 1], other.h[:, 1]) and not torch.equal(state.h[:, 0], other.h[:, 0])
    assert (model.eval()(torch.randint(0, 40, (1, 9)))[0] != 0).all()
