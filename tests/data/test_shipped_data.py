"""Every preset has a data config that makes what it trains on, and a run without its data names it."""

from pathlib import Path

import pytest

from data_pipeline.prepare_config import PrepareConfig
from lfm.config import shipped_data_config
from lfm.data.stream import open_training
from lfm.errors import UserError
from lfm.training.run import RunConfig

PRESETS = sorted(Path("configs").glob("*.yaml"))
IDS = {"gpt2": 50257, "FacebookAI/roberta-base": 50265, "meta-llama/Meta-Llama-3-8B": 128256}
"""Of tokenizers on the hub."""


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_its_data_config(preset):
    run = RunConfig.load(preset)
    path = run.data.path
    assert path is not None
    shipped = shipped_data_config(path)
    assert shipped is not None, f"no config in configs/data has output: {path}"
    data = PrepareConfig.load(shipped)
    assert data.output == path
    entries = data.tokenizer.train_vocab_size or IDS[data.tokenizer.file or ""]
    assert entries == run.model.vocab_size
    if data.format == "mds":
        assert data.seq_length == run.model.seq_length and run.data.windows == "sequential"


def test_a_run_without_its_data_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunConfig.load("lfm_tiny")
    sizes = {"seq_length": run.model.seq_length, "vocab_size": run.model.vocab_size, "rows_per_step": 1}
    with pytest.raises(UserError, match=r"make it with `lfm prepare --config configs/data/lfm_tiny\.yaml`"):
        open_training(run.data, **sizes)
    own = run.data.model_copy(update={"path": "data/my own"})
    with pytest.raises(UserError, match=r"make it with `lfm prepare FILE output='data/my own'`"):
        open_training(own, **sizes)
