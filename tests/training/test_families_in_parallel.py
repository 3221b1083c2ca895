"""Every family through the loop on two processes, and on from their checkpoint in one."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.layout.layout import check_layout
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from tests.training.test_families import TINY, run_of
from tests.training.tiny_run import losses

PLASTIC = {"liquidnn": ["model.plastic_from=0"]}
LAYOUT = {"transformer": ["parallel.tensor=2", "parallel.sequence_parallel=true"], "laerc": ["parallel.pipeline=2"]}


def run_here(kind, output, data, *more):
    options = ["training.steps=4", "validation.every_steps=2", "checkpoint.every_steps=2", *more]
    return run_of(kind, output, data, *PLASTIC.get(kind, []), *options)


def train_on_a_rank(process, kind, output, data):
    run = run_here(kind, output, data, "parallel.zero_stage=1", *LAYOUT.get(kind, []))
    sizes = {"global_batch_size": 4, "micro_batch_size": 2}
    train(run, process, check_layout(run.model, run.parallel, process.world_size, **sizes))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "liquidlm" else pytest.mark.slow) for kind in sorted(TINY)]
)
def test_two_processes_begin_what_one_goes_on_with(kind, tmp_path, text_data):
    """With dropout, whose draws are those of a row: micro-batches are cut alike."""
    alone = run_here(kind, tmp_path / "alone", text_data)
    train(alone)
    run_ranks(train_on_a_rank, 2, kind, tmp_path / "two", text_data)
    both = run_here(kind, tmp_path / "two", text_data)
    half = both.folder / "checkpoints/step_00000002"
    again = run_here(kind, tmp_path / "again", text_data, f"checkpoint.resume={half}")
    train(again)
    want = dict(losses(alone.folder))
    assert dict(losses(both.folder)) == pytest.approx(want, rel=1e-5)
    assert dict(losses(again.folder)) == pytest.approx({step: want[step] for step in (3, 4)}, rel=1e-5)
    assert validated(both.folder) == pytest.approx(validated(alone.folder), rel=1e-5)


def validated(folder) -> dict[tuple[int, str], float]:
    """Validation losses by step and, of liquidnn, mode."""
    records = read_metrics(folder / "metrics.jsonl")
    found = {(r["step"], key): value for r in records for key, value in r.items() if key.startswith("validation_loss")}
    assert {step for step, _ in found} == {2, 4}
    return found
