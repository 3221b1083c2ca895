"""Training on several processes through the real commands; ranks and launchers are killed, stopped and signalled.

Every command pays the imports of all its processes, so that a test proves what it can with one.  What takes long beside
that: a rank is taken for dead after 15 s without a sign of life.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.saver import Saver
from lfm.config import shipped_configs
from lfm.data.order import row_order
from lfm.data.reader import ShardReader
from lfm.training.loop import train
from lfm.training.run import RunConfig, owning_folder
from tests import shared_memory
from tests.launch.job import Job, bare, deepspeed, free_port, slurm, torchrun, until
from tests.training.tiny_run import (
    PYTHON,
    assert_same_checkpoint,
    checkpoint_tensors,
    losses,
    pretrain_command,
    tiny_run,
)

STEPS, SEED = 20, 1234
RUN = [
    f"seed={SEED}",
    "model.attention.num_query_groups=2",
    f"training.steps={STEPS}",
    "training.global_batch_size=8",
    "schedule.kind=constant",
    "validation.every_steps=10",
    "checkpoint.every_steps=5",
    "checkpoint.keep=99",
]
LOCAL = ["parallel.zero_stage=0"]
DATA_2 = ["parallel.zero_stage=1"]
EXPERT_2 = ["parallel.zero_stage=1", "parallel.expert=2"]
TENSOR_2_PIPELINE_2 = [
    *("parallel.zero_stage=1", "parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=2"),
]


def command(folder: Path, data: Path, *more: str) -> list[str]:
    return pretrain_command(folder, data, *RUN, *more)


def run_of(folder: Path, data: Path, *more: str) -> RunConfig:
    return tiny_run(folder, data, *RUN, *more)


def started_by(variables, num_ranks: int, words: list[str]) -> list:
    """The same command once a rank, each with what `variables` says of its place."""
    port = free_port()
    return [(words, variables(rank, num_ranks, port)) for rank in range(num_ranks)]


def run_folder(folder: Path) -> Path:
    return folder / "lfm_debug"


def saved_steps(folder: Path) -> list[int]:
    found = checkpoint.whole_checkpoints(run_folder(folder) / "checkpoints")
    return [int(path.name.removeprefix("step_")) for path in found]


def checkpoint_of(folder: Path, step: int) -> Path:
    return run_folder(folder) / f"checkpoints/step_{step:08d}"


def assert_losses_of(folder: Path, reference: Path, last_step: int = STEPS) -> None:
    """Those of the one process that trained alone, up to rounding."""
    found, wanted = losses(run_folder(folder)), losses(run_folder(reference))[:last_step]
    assert [step for step, _ in found] == list(range(1, last_step + 1))
    worst = max(abs(a - b) for (_, a), (_, b) in zip(found, wanted, strict=True))
    assert worst < 1e-5, f"a loss differs by {worst:.1e}"


def errors_in(job: Job) -> list[str]:
    return re.findall(r"^error: .*", job.output, re.MULTILINE)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text_data):
    """One process without a launcher: the losses that every layout must have."""
    folder = tmp_path_factory.mktemp("reference")
    train(run_of(folder, text_data, *LOCAL))
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, text_data):
    """Four ranks that nothing interrupts, started by a scheduler that sets the usual variables."""
    folder = tmp_path_factory.mktemp("four_ranks")
    words = command(folder, text_data, *TENSOR_2_PIPELINE_2)
    with Job(folder / "output", *started_by(bare, 4, words)) as job:
        assert job.wait() == [0, 0, 0, 0], job.output
    return folder


@pytest.mark.alone
def test_deepspeed_trains_as_one_process_does_and_leaves_no_shared_memory(tmp_path, text_data, reference):
    shared = shared_memory.names()
    with Job(tmp_path / "output", (deepspeed(2, command(tmp_path, text_data, *DATA_2)), {})) as job:
        assert job.wait() == [0], job.output
    assert "layout: world 2 = tensor 1 x pipeline 1 x data 2, ZeRO-1" in job.output
    assert not shared_memory.abandoned(shared), "shared memory was left behind"
    assert_losses_of(tmp_path, reference)


def test_four_ranks_without_a_launcher_train_as_one_process_does(four_ranks, reference):
    assert_losses_of(four_ranks, reference)


def test_a_killed_rank_ends_all_and_the_same_command_goes_on_to_the_same_bits(tmp_path, text_data, four_ranks):
    words = command(tmp_path, text_data, *TENSOR_2_PIPELINE_2)
    with Job(tmp_path / "output", *started_by(bare, 4, words)) as job:
        until(lambda: job.step() >= 7 and saved_steps(tmp_path), 400, job)
        victim = job.ranks()[2]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait() == [1, 1, -signal.SIGKILL, 1], job.output
        assert time.monotonic() - killed < 60
    assert errors_in(job)[0].startswith(f"error: rank 2 (pid {victim}"), job.output
    assert (run_folder(tmp_path) / "failure.txt").read_text().splitlines()[0] == errors_in(job)[0]
    assert saved_steps(tmp_path)[-1] < STEPS
    with Job(tmp_path / "output", *started_by(bare, 4, words)) as job:
        assert job.wait() == [0, 0, 0, 0], job.output
    assert losses(run_folder(tmp_path)) == losses(run_folder(four_ranks))
    assert_same_checkpoint(checkpoint_of(tmp_path, STEPS), checkpoint_of(four_ranks, STEPS))


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all_and_any_layout_goes_on(tmp_path, text_data, reference):
    whole, resumed, moved = tmp_path / "whole", tmp_path / "resumed", tmp_path / "moved"
    output = tmp_path / "output"
    with Job(output, (torchrun(2, command(whole, text_data, *EXPERT_2)), {})) as job:
        assert job.wait() == [0], job.output
    assert_losses_of(whole, reference)

    words = torchrun(2, command(resumed, text_data, *EXPERT_2))
    with Job(output, (words, {})) as job:
        until(lambda: job.step() >= 3, 400, job)
        os.kill(job.ranks()[1], signal.SIGUSR1)
        assert job.wait() == [0], job.output
    stopped = int(re.search(r"stopped by a signal to another rank after step (\d+); saved", job.output)[1])
    assert 3 <= stopped < STEPS and saved_steps(resumed)[-1] == stopped
    shutil.copytree(resumed, moved)
    with Job(output, (words, {})) as job:
        assert job.wait() == [0], job.output
    assert losses(run_folder(resumed)) == losses(run_folder(whole))
    assert_same_checkpoint(checkpoint_of(resumed, STEPS), checkpoint_of(whole, STEPS))

    train(run_of(moved, text_data, *LOCAL, f"training.steps={stopped + 1}"))
    with Job(output, *started_by(slurm, 4, command(moved, text_data, *TENSOR_2_PIPELINE_2))) as job:
        until(lambda: job.step() >= stopped + 2, 400, job)
        os.kill(job.ranks()[3], signal.SIGTERM)
        assert job.wait() == [0, 0, 0, 0], job.output
    assert f"step_{stopped + 1:08d} at step {stopped + 1}\n" in job.output
    assert_losses_of(moved, reference, last_step=saved_steps(moved)[-1])


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_generates_on_one(four_ranks):
    words = [PYTHON, "launch/generate.py", "--checkpoint", run_folder(four_ranks), "--prompt", "import "]
    found = subprocess.run([*words, "--max-new-tokens", "5"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("import "), found.stderr


@pytest.mark.slow
def test_damaged_data_of_one_rank_end_all_after_saving(tmp_path, text_data):
    data = tmp_path / "data"
    config = json.loads((text_data / "report.json").read_text())["config"]
    prepare(PrepareConfig.from_tree(config | {"output": str(data), "shard_bytes": 8192}, source="a test"))
    shard, step = _shard_that_one_rank_reads_first(data / "train", after_step=3)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    words = command(tmp_path, data, *DATA_2, "checkpoint.every_steps=0")
    with Job(tmp_path / "output", *started_by(bare, 2, words)) as job:
        assert job.wait() == [2, 2], job.output
    (error,) = errors_in(job)
    assert str(shard) in error and "is damaged" in error
    assert "Traceback" not in job.output
    assert saved_steps(tmp_path) == [step - 1]
    shard.write_bytes(content)
    assert train(run_of(tmp_path, data, *LOCAL, f"training.steps={step + 1}")).step == step + 1


def _shard_that_one_rank_reads_first(folder: Path, after_step: int) -> tuple[Path, int]:
    """A shard of which no rank reads before the step returned, and one of two ranks does in it."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    shard_of_row = [number for number, shard in enumerate(shards) for _ in range(shard["samples"])]
    seen: set[int] = set()
    for step in range(1, STEPS):
        rows = row_order(SEED, len(shard_of_row), 8 * (step - 1), 8)
        of_rank = [{shard_of_row[row] for row in rows[part]} for part in (slice(0, 4), slice(4, 8))]
        alone = (of_rank[1] - of_rank[0]) - seen
        if step > after_step and alone:
            return folder / shards[alone.pop()]["raw_data"]["basename"], step
        seen |= of_rank[0] | of_rank[1]
    raise AssertionError("the data set has too few shards")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path, text_data):
    """By an embedding, of a token that only the second rank meets some steps after the start, whose square overflows:
    a state with a NaN is not resumed from."""
    untied, start = "model.untie_embeddings_and_output_weights=true", 1
    token, step = _token_that_the_second_rank_meets_first(text_data, start)
    train(run_of(tmp_path, text_data, *LOCAL, untied, f"training.steps={start}"))
    path = checkpoint_of(tmp_path, start)
    tensors, manifest = checkpoint_tensors(path)
    tensors["master.embedding.weight"][token] = 3e38
    tokenizer = (path / "tokenizer.json").read_bytes()
    shutil.rmtree(path)
    kept = {key: manifest[key] for key in ("config", "progress", "counters", "data")}
    Saver(path.parent, keep=9, asynchronous=False).save(start, tensors, kept, tokenizer)

    often = ["checkpoint.every_steps=1", "validation.every_steps=0"]
    words = command(tmp_path, text_data, *DATA_2, untied, f"training.steps={step + 3}", *often)
    with Job(tmp_path / "output", *started_by(bare, 2, words)) as job:
        assert job.wait() == [3, 3], job.output
    (error,) = errors_in(job)
    assert re.search(rf"step {step}: gradient norm is not finite \((inf|nan)\)", error), error
    assert "no update was made" in error and "Traceback" not in job.output
    assert saved_steps(tmp_path) == list(range(start, step))


def _token_that_the_second_rank_meets_first(data: Path, start: int) -> tuple[int, int]:
    """A token that the second of two ranks meets in the step returned, and nobody before, from step `start` on."""
    reader = ShardReader(data / "train")
    seen: set[int] = set()
    for step in range(start + 1, 1000):
        ids = reader.read(row_order(SEED, len(reader), 8 * (step - 1), 8)).ids
        first, second = (set(rows.flatten().tolist()) for rows in ids.chunk(2))
        new = second - first - seen
        if new and step > start + 2:
            return min(new), step
        seen |= first | second
    raise AssertionError("every token is met early")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_and_is_named(tmp_path, text_data):
    """Rank 0 writes its plot, at a validation, to a file that does not answer, as on a file system that is gone."""
    hang_timeout, validation = 10, 300
    often = [f"training.steps={2 * validation}", f"validation.every_steps={validation}", "checkpoint.every_steps=0"]
    words = command(tmp_path, text_data, *DATA_2, *often, f"parallel.hang_timeout_seconds={hang_timeout}")
    with Job(tmp_path / "output", *started_by(bare, 2, words)) as job:
        until(lambda: job.step() >= 1, 400, job)
        (run_folder(tmp_path) / "plots").mkdir()
        os.mkfifo(run_folder(tmp_path) / f"plots/.loss.png.{job.ranks()[0]}.tmp")
        assert job.step() < validation
        until(lambda: job.step() == validation, 400, job)
        hung = time.monotonic()
        assert job.wait() == [1, 1], job.output
        assert time.monotonic() - hung < hang_timeout + 30
    assert re.match(r"error: rank 0 \(pid \d+, host .*\) hangs: \d+ s in phase", errors_in(job)[0])
    assert "lfm/training/plots.py" in job.output  # where it writes


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others_and_then_itself(tmp_path, text_data):
    with Job(tmp_path / "output", *started_by(bare, 2, command(tmp_path, text_data, *DATA_2))) as job:
        until(lambda: job.step() >= 2, 400, job)
        stopped = job.ranks()[1]
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: job.processes[0].poll() is not None, 60, job)
        assert errors_in(job)[0].startswith(f"error: rank 1 (pid {stopped}"), job.output
        os.kill(stopped, signal.SIGCONT)
        assert job.wait(60) == [1, 1], job.output


LAUNCHERS = {
    "torchrun": (torchrun, r"bin/torchrun$"),
    "deepspeed_of_the_node": (deepspeed, r"^deepspeed\.launcher\.launch$"),
    "deepspeed": (deepspeed, r"bin/deepspeed$"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_ranks_whose_launcher_was_killed_save_and_end(name, tmp_path, text_data, reference):
    launch, called = LAUNCHERS[name]
    with Job(tmp_path / "output", (launch(2, command(tmp_path, text_data, *DATA_2)), {})) as job:
        until(lambda: job.step() >= 2, 400, job)
        (launcher,) = job.named(called)
        os.kill(launcher, signal.SIGKILL)
        killed = time.monotonic()
        job.wait()
        assert time.monotonic() - killed < 60
    assert re.search(rf"stopped by the end of its launcher, \S+ \(pid {launcher}\),", job.output), job.output
    stopped = saved_steps(tmp_path)[-1]
    assert 2 <= stopped < STEPS
    train(run_of(tmp_path, text_data, *LOCAL, f"training.steps={stopped + 2}"))
    assert_losses_of(tmp_path, reference, last_step=stopped + 2)


@pytest.mark.slow
def test_a_layout_that_is_not_legal_is_refused_once_before_the_ranks_meet(tmp_path, text_data):
    words = command(tmp_path, text_data, *DATA_2, "parallel.pipeline=2", "parallel.tensor=2")
    with (
        Job(tmp_path / "torchrun", (torchrun(2, words), {})) as launched,
        Job(tmp_path / "slurm", *started_by(slurm, 2, words)) as bare_tasks,
    ):
        assert launched.wait(120) == [1], launched.output  # torchrun's own, for every failure
        assert bare_tasks.wait(120) == [2, 2], bare_tasks.output
    for job in (launched, bare_tasks):
        (error,) = errors_in(job)
        assert "parallel.tensor=2 x pipeline=2 with expert=1 does not fit on 2 processes" in error
    assert not run_folder(tmp_path).exists()


@pytest.mark.slow
def test_before_the_ranks_meet_the_one_that_fails_speaks_and_a_signal_ends_the_one_that_waits(tmp_path, text_data):
    """Four jobs at once: rank 1 has no configuration, bare, under torchrun, and alone under Slurm; rank 0 is alone."""
    words, without = command(tmp_path, text_data, *DATA_2), [PYTHON, "launch/pretrain.py", "--config", "/none.yaml"]
    choose = f"if [ $RANK = 1 ]; then exec {shlex.join(without)}; else exec {shlex.join(words)}; fi"
    launched = torchrun(2, ["", "--no-python", "bash", "-c", choose])
    port, lonely = free_port(), free_port()
    with (
        Job(tmp_path / "bare", (words, bare(0, 2, port)), (without, bare(1, 2, port))) as bare_ranks,
        Job(tmp_path / "torchrun", (launched, {})) as torchrun_ranks,
        Job(tmp_path / "alone", (words, bare(0, 2, lonely))) as alone,
        Job(tmp_path / "slurm", (without, slurm(1, 2, free_port()))) as slurm_rank,
    ):
        assert bare_ranks.wait(120) == [2, 2], bare_ranks.output
        assert torchrun_ranks.wait(120) == [1], torchrun_ranks.output  # its own, for every failure
        assert slurm_rank.wait(120) == [2], slurm_rank.output
        until(lambda: answers(lonely), 120, alone)
        os.kill(alone.processes[0].pid, signal.SIGTERM)
        signalled = time.monotonic()
        assert alone.wait(60) == [0], alone.output
        assert time.monotonic() - signalled < 20
    for job in (bare_ranks, torchrun_ranks, slurm_rank):
        assert errors_in(job) == [
            f"error: rank 1: config file /none.yaml does not exist; {shipped_configs()} holds the shipped ones"
        ]
        assert "lfm/" not in job.output and "Error" not in job.output.replace("ChildFailedError", "")
    assert "stopped by SIGTERM while the ranks met; the run stands at step 0" in alone.output
    assert (run_folder(tmp_path) / "stopped").read_text() == "0 SIGTERM\n"


@pytest.mark.slow
def test_a_run_folder_in_use_is_refused_once_by_all_ranks(tmp_path, text_data):
    with owning_folder(run_of(tmp_path, text_data)):
        with Job(tmp_path / "output", *started_by(bare, 2, command(tmp_path, text_data, *DATA_2))) as job:
            assert job.wait() == [2, 2], job.output
    (error,) = errors_in(job)
    assert "another process trains in" in error and "Traceback" not in job.output


@pytest.mark.slow
def test_a_rendezvous_that_another_program_holds_is_refused_in_one_sentence(tmp_path, text_data):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = bare(0, 2, other.getsockname()[1])
        with Job(tmp_path / "output", (command(tmp_path, text_data, *DATA_2), address)) as job:
            assert job.wait() == [2], job.output
    (error,) = errors_in(job)
    assert re.search(r"rank 0 of 2 cannot meet the others at 127\.0\.0\.1:\d+ .*address already in use", error)
    assert "Traceback" not in job.output
