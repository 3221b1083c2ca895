"""A run that goes back to one of its checkpoints is the run that never left it."""

from dataclasses import replace

import pytest
import torch

from data_pipeline.audit import first_difference
from lfm.checkpoint.manifest import read_manifest
from lfm.data.consumed import read_record
from lfm.data.stream import open_training
from lfm.errors import UserError
from lfm.job.process import Process
from lfm.training.draws import seed_of_draws
from lfm.training.loop import open_state, progress_bar, train, train_steps
from lfm.training.metrics_file import read_metrics
from lfm.training.saves import Saves
from lfm.training.start import started
from tests.training.tiny_run import assert_same_checkpoint, losses, tiny_run

OPTIONS = ("checkpoint.keep=9", "logging.tensorboard=true", "logging.steps_per_epoch=4")
TIMES = ("time", "tokens_per_second", "tflops", "mfu", "memory", "eta", "data_wait", "save_")


def train_with(events, run, process=None, layout=None):
    """As `train`, without its words; `events` are called once with the run's saves, when that many steps are made."""
    left = dict(events)
    with started(run, process or Process(), layout, lambda: None) as start:
        state = open_state(run, start)
        with progress_bar(state) as bar, Saves(state, start, bar) as saves:

            def before_a_step():
                return left.pop(state.progress.step, lambda _: None)(saves)

            train_steps(run, replace(start, why_stop=before_a_step), state, saves)
            saves.finish(wanted=True)
            state.stream.close()
            if state.metrics is not None:
                state.metrics.__exit__()


def back_to(step, **options):
    return lambda saves: saves.rewind(saves.saver.folder / f"step_{step:08d}", **options)


def without_times(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith(TIMES)} for record in records]


def csv_without_times(folder):
    return [line.rpartition(",")[0] for line in (folder / "loss_log.csv").read_text().splitlines()]


def in_tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("cross_entropy")]


@pytest.fixture(scope="module")
def never_left(tmp_path_factory, text_data):
    run = tiny_run(tmp_path_factory.mktemp("never_left"), text_data, *OPTIONS)
    train(run)
    return run.folder


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, text_data):
    """Back from step 3 to step 2 and on, six rows further in the data."""
    run = tiny_run(tmp_path_factory.mktemp("skipping"), text_data, *OPTIONS)
    train_with({3: back_to(2, skip_rows=6)}, run)
    return run.folder


@pytest.mark.parametrize("threads", [0, 2])
def test_rewound_equals_never_left(threads, never_left, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, *OPTIONS, f"data.prefetch_threads={threads}")
    train_with({5: back_to(2)}, run)
    rewound = run.folder
    for step in (4, 6):
        name = f"checkpoints/step_{step:08d}"
        assert_same_checkpoint(rewound / name, never_left / name)
    assert (rewound / "checkpoints/abandoned_step_00000004").exists()
    assert (rewound / "consumed.txt").read_bytes() == (never_left / "consumed.txt").read_bytes()
    assert without_times(rewound) == without_times(never_left)
    assert csv_without_times(rewound) == csv_without_times(never_left)
    assert in_tensorboard(rewound) == in_tensorboard(never_left)


def test_rows_that_are_skipped_shift_the_data_from_there_on(skipping, never_left, text_data):
    run = tiny_run(skipping.parent, text_data)
    rows = open_training(run.data, seq_length=64, vocab_size=512, rows_per_step=4)
    for step, entry in enumerate(read_record(skipping), start=1):
        first = 4 * (step - 1) + (6 if step > 2 else 0)
        assert entry.digest == rows.read(rows.order(run.seed, first, 4)).digest()
    assert losses(skipping)[:2] == losses(never_left)[:2] and losses(skipping)[2] != losses(never_left)[2]
    assert first_difference(read_record(never_left), read_record(skipping)) == 3
    manifest = read_manifest(skipping / "checkpoints/step_00000006")
    assert manifest["progress"]["skips"] == [{"step": 2, "rows": 6}] and manifest["data"]["position"] == 4 * 6 + 6


def test_a_run_resumed_after_a_skip_reads_on_alike(skipping, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, *OPTIONS)
    train_with({3: back_to(2, skip_rows=6), 5: lambda _: "the test"}, run)
    assert read_manifest(run.folder / "checkpoints/step_00000005")["progress"]["skips"] == [{"step": 2, "rows": 6}]
    train(run)
    name = "checkpoints/step_00000006"
    assert_same_checkpoint(run.folder / name, skipping / name)
    assert read_record(run.folder) == read_record(skipping)


def test_a_run_goes_back_and_passes_rows_over_by_two_keys(skipping, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, *OPTIONS, "training.steps=4")
    train(run)
    before = run.folder / "checkpoints/step_00000002"
    train(tiny_run(tmp_path, text_data, *OPTIONS, f"checkpoint.resume={before}", "checkpoint.skip_rows=6"))
    name = "checkpoints/step_00000006"
    assert_same_checkpoint(run.folder / name, skipping / name)
    assert read_record(run.folder) == read_record(skipping)
    assert (run.folder / "checkpoints/abandoned_step_00000004").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_rows_are_passed_over_from_a_named_checkpoint_alone(resume, tmp_path, text_data):
    with pytest.raises(UserError, match=rf"skip_rows=6 is of the checkpoint .* resume={resume} names none; set resume"):
        tiny_run(tmp_path, text_data, "checkpoint.skip_rows=6", f"checkpoint.resume={resume}")


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path, text_data):
    def damage_and_go_back(saves):
        saves.settle()
        (saves.saver.folder / "step_00000002/tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"step_00000002/tokenizer\.json has 2 bytes instead of"):
            back_to(2)(saves)

    run = tiny_run(tmp_path, text_data, "training.steps=4")
    train_with({3: damage_and_go_back}, run)
    assert [entry.step for entry in read_record(run.folder)] == [1, 2, 3, 4] and len(losses(run.folder)) == 4


def on_two_ranks(process, output, data):
    from lfm.layout.layout import check_layout

    options = ("model.attention.num_query_groups=2", "parallel.zero_stage=1", "training.steps=4", "checkpoint.keep=9")
    run = tiny_run(output, data, *options, "checkpoint.every_steps=1")
    layout = check_layout(run.model, run.parallel, 2, global_batch_size=4, micro_batch_size=2)
    found = []

    def note_and_go_back(saves):
        found.append(losses(run.folder))
        back_to(1)(saves)

    train_with({3: note_and_go_back}, run, process, layout)
    return found[0], torch.initial_seed() == seed_of_draws(run.seed, 3, first_row=2 * process.rank)


@pytest.mark.slow
def test_two_ranks_go_back_together(tmp_path, text_data):
    pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
    pytest.importorskip("deepspeed", reason="needs the extra `parallel`")
    from lfm.job.fork import run_ranks

    (before, *drawn), (_, *drawn_too) = run_ranks(on_two_ranks, 2, tmp_path, text_data)
    assert all((*drawn, *drawn_too)), "random draws were not of the last step and each rank's own rows"
    folder = tmp_path / "lfm_debug"
    after = losses(folder)
    assert [step for step, _ in before] == [1, 2, 3] and [step for step, _ in after] == [1, 2, 3, 4]
    assert before == after[:3]
    for step in (2, 3):
        name = f"step_{step:08d}"
        assert_same_checkpoint(folder / "checkpoints" / name, folder / f"checkpoints/abandoned_{name}")
    assert [entry.step for entry in read_record(folder)] == [1, 2, 3, 4]
