"""Training on several streams in proportions that change."""

import json

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.consumed import read_record
from lfm.errors import UserError
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from tests.training.tiny_run import assert_same_checkpoint, losses, tiny_run


@pytest.fixture(scope="module")
def second(tmp_path_factory, text_data):
    """Other text by the same tokenizer."""
    folder = tmp_path_factory.mktemp("second") / "data"
    tree = {
        "output": str(folder),
        "sources": [{"kind": "code", "paths": ["{stdlib}/logging/*.py"]}],
        "tokenizer": {"file": str(text_data / "tokenizer.json")},
        "seq_length": 64,
        "validation_fraction": 0.5,
    }
    prepare(PrepareConfig.from_tree(tree, source="the second fixture"))
    return folder


def run_on(output, first, second, steps, before, after):
    """`second` has the part `before`, and `after` from step 2 on."""
    streams = [
        {"name": "mail", "path": str(first), "proportion": 1},
        {"name": "logs", "path": str(second), "proportion": {0: before, 2: after}},
    ]
    options = ["data.path=null", f"data.streams={json.dumps(streams)}", f"training.steps={steps}"]
    return tiny_run(output, first, "schedule.kind=constant", *options)


def test_a_run_on_two_streams_goes_on_exactly_and_tells_their_losses(text_data, second, tmp_path):
    whole = run_on(tmp_path / "whole", text_data, second, 4, 0, 1)
    train(whole)
    train(run_on(tmp_path / "parts", text_data, second, 2, 0, 7))  # what comes later is still open
    with pytest.raises(UserError, match=r"data\.streams or their proportions before row 8 of the run"):
        train(run_on(tmp_path / "parts", text_data, second, 4, 1, 1))
    parts = run_on(tmp_path / "parts", text_data, second, 4, 0, 1)
    train(parts)
    assert losses(parts.folder) == losses(whole.folder) and len(losses(whole.folder)) == 4
    assert read_record(parts.folder) == read_record(whole.folder)
    last = "checkpoints/step_00000004"
    assert_same_checkpoint(whole.folder / last, parts.folder / last)

    records = read_metrics(whole.folder / "metrics.jsonl")
    (validated,) = (r for r in records if r["step"] == 4 and "validation_loss" in r)
    of_each = validated["validation_loss_of_mail"], validated["validation_loss_of_logs"]
    assert min(of_each) < validated["validation_loss"] < max(of_each)
    waited = [r["data_wait_seconds"] for r in records if "data_wait_seconds" in r]
    assert len(waited) == 4 and all(0 < seconds < 60 for seconds in waited)


def test_the_first_steps_are_those_of_the_first_stream_alone(text_data, second, tmp_path):
    mixed = run_on(tmp_path / "mixed", text_data, second, 4, 0, 1)
    train(mixed)
    train(tiny_run(tmp_path / "alone", text_data, "schedule.kind=constant", "training.steps=2"))
    mixed_record, alone = read_record(mixed.folder), read_record(tmp_path / "alone/lfm_debug")
    assert [entry.chain for entry in mixed_record][:2] == [entry.chain for entry in alone]
