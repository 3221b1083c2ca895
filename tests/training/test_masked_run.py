"""Training on prompts and completions, of which the completions alone are labels."""

import pytest
import torch

from lfm.data.batch import Batch
from lfm.data.consumed import read_record
from lfm.data.reader import ShardReader
from lfm.evaluation.held_out import spread
from lfm.inference.load import load_model
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from tests.data_pipeline.test_completions import pairs, prepared, write_lines
from tests.training.tiny_run import losses, tiny_run

KEYS = [
    "data.allow_smaller_tokenizer=true",
    "schedule.kind=constant",
    "training.steps=4",
    "validation.every_steps=4",
    "validation.max_rows=6",
]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    return prepared(write_lines(folder / "a.jsonl", pairs(120)), folder / "data")


@pytest.fixture(scope="module")
def whole(masked, tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("whole"), masked, *KEYS)
    train(run)
    return run


def test_the_loss_is_the_cross_entropy_of_the_masked_labels_alone(masked, whole):
    model, _, _ = load_model(whole.folder, device=torch.device("cpu"), dtype=torch.float32)
    model.eval()
    rows = ShardReader(masked / "validation")
    batch = rows.read(spread(6, len(rows)))
    assert batch.label_mask is not None
    plain = Batch(batch.ids, batch.lengths).to("cpu")
    with torch.no_grad():
        logits = model.logits(model.advance(plain.ids, documents=plain.documents)[0]).log_softmax(-1)
    total, count = 0.0, 0
    for row, lengths in enumerate(batch.lengths):
        start = 0
        for length in lengths:
            for t in range(start + 1, start + length):
                if batch.label_mask[row, t]:
                    total -= float(logits[row, t - 1, batch.ids[row, t]])
                    count += 1
            start += length
    found = [record for record in read_metrics(whole.folder / "metrics.jsonl") if "validation_loss" in record][-1]
    assert found["validation_labels"] == count < sum(n - 1 for lengths in batch.lengths for n in lengths)
    assert found["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_masked_run_goes_on_with_the_rows_and_losses_of_one_that_never_stopped(masked, whole, tmp_path):
    train(tiny_run(tmp_path / "parts", masked, *KEYS, "training.steps=2"))
    parts = tiny_run(tmp_path / "parts", masked, *KEYS)
    train(parts)
    assert losses(parts.folder) == losses(whole.folder) and len(losses(whole.folder)) == 4
    assert read_record(parts.folder) == read_record(whole.folder)
