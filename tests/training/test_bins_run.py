"""Training on train.bin and val.bin."""

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.errors import UserError
from lfm.training.loop import train
from tests.training.tiny_run import assert_same_checkpoint, losses, tiny_run


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bins") / "data"
    tree = {
        "output": str(folder),
        "sources": [{"kind": "code", "paths": ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}],
        "tokenizer": {"train_vocab_size": 512},
        "format": "bins",
        "validation_fraction": 0.2,
    }
    prepare(PrepareConfig.from_tree(tree, source="the bins fixture"))
    return folder


def test_a_run_on_random_windows_goes_on_exactly_and_only_on_them(bins, tmp_path):
    keys = ["data.windows=random", "schedule.kind=constant", "training.steps=4"]
    whole = tiny_run(tmp_path / "whole", bins, *keys)
    train(whole)
    train(tiny_run(tmp_path / "parts", bins, *keys, "training.steps=2"))
    with pytest.raises(UserError, match=r"keep data\.windows and seq_length"):
        train(tiny_run(tmp_path / "parts", bins, *keys, "data.windows=sequential"))
    parts = tiny_run(tmp_path / "parts", bins, *keys)
    train(parts)
    assert losses(parts.folder) == losses(whole.folder) and len(losses(whole.folder)) == 4
    last = "checkpoints/step_00000004"
    assert_same_checkpoint(whole.folder / last, parts.folder / last)
