"""Processes whose cards would balance the stages differently."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.layout.layout import check_layout
from lfm.training.loop import train
from tests.training.test_families import run_of
from tests.training.tiny_run import losses

THREE_LAYERS = ["training.steps=1", "model.num_layers=3"]


def train_with_stages_of_its_own(process, output, data):
    run = run_of("transformer", output, data, *THREE_LAYERS, "parallel.zero_stage=1", "parallel.pipeline=2")
    own = run.parallel.model_copy(update={"stage_layers": (1, 2) if process.rank == 0 else (2, 1)})
    train(run, process, check_layout(run.model, own, process.world_size, global_batch_size=4, micro_batch_size=2))


def test_all_take_the_stages_of_the_first_rank(tmp_path, text_data):
    run_ranks(train_with_stages_of_its_own, 2, tmp_path / "two", text_data)
    alone = run_of("transformer", tmp_path / "alone", text_data, *THREE_LAYERS)
    train(alone)
    found = losses((tmp_path / "two") / alone.folder.name)
    assert dict(found) == pytest.approx(dict(losses(alone.folder)), rel=1e-5)
