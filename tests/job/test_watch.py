import contextlib
import errno
import functools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lfm.errors import NonFiniteError, UserError
from lfm.job.watch import watched
from tests.launch.job import free_port

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
HEARTBEAT, HANG = 3, 4


@pytest.fixture(scope="module", autouse=True)
def torchruns(tmp_path_factory):
    """Started before the other tests, as the three processes of each first import torch; (process, folder) by name."""
    started = {}
    for name in ("fail", "orphan"):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += [str(Path(__file__).with_name("watched_job.py")), str(folder), name]
        with open(folder / "output", "w", encoding="utf-8") as output:
            process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=output)
        started[name] = process, folder
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def run_rank(rank: int, world_size: int, port: int, folder: Path, body, late_port: int | None = None) -> None:
    log = os.open(folder / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    if late_port is not None and rank == 0:
        threading.Timer(HANG + 1, host_for_good, [late_port]).start()
    with watched(
        rank=rank,
        world_size=world_size,
        address=("127.0.0.1", late_port or port),
        heartbeat_timeout_seconds=HEARTBEAT,
        hang_timeout_seconds=HANG,
        report=folder / "failure.txt",
    ) as watch:
        body(rank, watch)
    print("left", flush=True)
    os._exit(0)


def host_for_good(port: int) -> None:
    stores.append(dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))


stores: list[dist.TCPStore] = []


class Job:
    """`world_size` forked ranks that run `body(rank, watch)`; their output and exit codes.

    `store_is_late`: the store of the watch answers only after the time in which a rank without a new phase hangs.
    """

    def __init__(self, folder: Path, world_size: int, body, *, store_is_late: bool = False) -> None:
        given = (world_size, free_port(), folder, body, free_port() if store_is_late else None)
        fork = multiprocessing.get_context("fork")
        self.folder, self.started = folder, time.monotonic()
        self.ranks = [fork.Process(target=run_rank, args=(rank, *given)) for rank in range(world_size)]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def until_training(self) -> None:
        until(lambda: all((self.folder / f"training.{rank}").exists() for rank in range(len(self.ranks))))

    def codes(self, *ranks: int, within: float = 40) -> list[int | None]:
        """Exit codes of `ranks`, or of all; None of one that has not ended `within` seconds."""
        processes = [self.ranks[rank] for rank in ranks] or self.ranks
        deadline = time.monotonic() + within
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]

    def output(self) -> str:
        return (self.folder / "output").read_text()


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def train(rank: int, watch, folder: Path, *, steps: int = 1000, at_step_3=None) -> None:
    """Steps that wait for each other; `at_step_3(rank)` is what goes wrong."""
    for step in range(steps):
        watch.phase(f"step {step}: data")
        if step == 3 and at_step_3 is not None:
            at_step_3(rank)
        watch.phase(f"step {step}: reduce")
        dist.all_reduce(torch.ones(4))
        if step == 2:
            (folder / f"training.{rank}").touch()
        time.sleep(0.02)


def test_the_first_cause_ends_all_ranks_with_one_summary(tmp_path):
    def fail_on_1(rank):
        if rank == 1:
            raise ZeroDivisionError("the scale is 0")

    with Job(tmp_path, 3, lambda rank, watch: train(rank, watch, tmp_path, at_step_3=fail_on_1)) as job:
        assert job.codes(within=20) == [1] * 3
    output = job.output()
    first = output.splitlines()[0]
    assert first.startswith("error: rank 1 (pid ") and socket.gethostname() in first
    assert first.endswith("failed in phase 'step 3: data': ZeroDivisionError: the scale is 0")
    cause, others = output.split("Last phase and main thread of every rank:\n")
    assert "Traceback" in cause and "raise ZeroDivisionError" in cause and "Traceback" not in others
    assert "rank 1: in phase 'step 3: data'" in others
    assert "ranks 0, 2: in phase 'step 3: reduce'" in others
    assert "dist.all_reduce(torch.ones(4))" in others
    assert (tmp_path / "failure.txt").read_text() == output


@pytest.mark.parametrize(
    "rank, error, code",
    [
        (2, UserError("data.path=/nowhere is not there"), 2),
        (0, NonFiniteError("the loss is nan"), 3),
        (1, FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere"), 2),
    ],
    ids=["a user's mistake on rank 2", "a non-finite loss on rank 0, which hosts the store", "a refusal on rank 1"],
)
def test_an_expected_end_is_one_sentence_and_its_code(tmp_path, rank, error, code):
    def body(own_rank, watch):
        if own_rank == rank:
            raise error
        train(own_rank, watch, tmp_path)

    with Job(tmp_path, 3, body) as job:
        assert job.codes(within=20) == [code] * 3
    sentence = error if code == 3 or rank == 2 else "/nowhere: No such file or directory"
    assert job.output() == f"error: rank {rank}: {sentence}\n"
    assert not (tmp_path / "failure.txt").exists()


@pytest.mark.parametrize("killed", [2, 0], ids=["rank 2", "rank 0, which hosts the store"])
def test_a_killed_rank_is_named(tmp_path, killed):
    with Job(tmp_path, 3, lambda rank, watch: train(rank, watch, tmp_path)) as job:
        job.until_training()
        time.sleep(2.5)  # beats tell the phase: about a second apart, and read as often
        killed_at = time.monotonic()
        job.ranks[killed].kill()
        others = [rank for rank in range(3) if rank != killed]
        assert job.codes(*others) == [1, 1]
        assert time.monotonic() - killed_at < HEARTBEAT + 8
    output = job.output()
    [headline] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert headline.startswith(
        f"error: rank {killed} (pid {job.ranks[killed].pid}, host {socket.gethostname()}) died, "
    )
    assert "its last phase: step " in headline
    assert f"rank {killed}: no report" in output
    for rank in others:
        assert re.search(rf"^ranks? .*\b{rank}\b.*: in phase 'step ", output, re.MULTILINE)
    assert "dist.all_reduce" in output


def test_a_stopped_process_that_hosts_the_store_is_named(tmp_path):
    with Job(tmp_path, 3, lambda rank, watch: train(rank, watch, tmp_path)) as job:
        job.until_training()
        os.kill(job.ranks[0].pid, signal.SIGSTOP)
        assert job.codes(1, 2) == [1, 1]
    output = job.output()
    [headline] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert headline.startswith("error: rank 0 (pid ") and "died, was killed or is stopped" in headline
    assert "rank 0: no report" in output and output.count(": in phase 'step ") >= 1 and "dist.all_reduce" in output


def hangs(rank: int, watch, folder: Path) -> None:
    def hang(rank):
        if rank == 1:
            time.sleep(1000)  # the line to be shown

    train(rank, watch, folder, at_step_3=hang)


def saves_long(rank: int, watch, folder: Path) -> None:
    if rank == 1:
        watch.phase("saving", allow_seconds=60)
        time.sleep(HANG + 3)
    watch.phase("waiting for the save")
    dist.barrier()


def hangs_before_a_save(rank: int, watch, folder: Path) -> None:
    """Rank 1 is in a phase that may take long when it begins to wait for rank 0."""
    watch.phase("step 0: data")
    if rank == 0:
        time.sleep(1000)
    watch.phase("saving", allow_seconds=1000)
    dist.barrier()


def loses_a_connection(rank: int, watch, folder: Path) -> None:
    """Rank 1 goes on, and only ever works alone."""
    train(rank, watch, folder, steps=4)
    if rank == 1:
        dist.destroy_process_group()
    while True:
        watch.phase("working alone")
        if rank == 0:
            dist.all_reduce(torch.ones(4))
        time.sleep(0.1)


def ends_at_different_times(rank: int, watch, folder: Path) -> None:
    train(rank, watch, folder, steps=3)
    watch.phase("the last work", allow_seconds=60)
    time.sleep([0, HEARTBEAT + 2, 1][rank])


def leaves_early(rank: int, watch, folder: Path) -> None:
    """Rank 1 leaves; rank 0, which it leaves alone, fails in a collective."""
    train(rank, watch, folder, at_step_3=lambda rank: sys.exit(0) if rank == 1 else None)


def starts_slowly(rank: int, watch, folder: Path) -> None:
    train(rank, watch, folder, steps=3)


def dies_soon_after_a_new_phase(rank: int, watch, folder: Path) -> None:
    watch.phase("starting")
    time.sleep(2.5)
    watch.phase("going on")
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The jobs that mostly wait, at the same time."""
    with contextlib.ExitStack() as stack:
        started = {}
        for body in (
            *(hangs, saves_long, hangs_before_a_save, loses_a_connection, ends_at_different_times),
            *(leaves_early, dies_soon_after_a_new_phase, starts_slowly),
        ):
            folder = tmp_path_factory.mktemp(body.__name__)
            run = functools.partial(body, folder=folder)
            world_size = 3 if body in (hangs, ends_at_different_times) else 2
            job = Job(folder, world_size, run, store_is_late=body is starts_slowly)
            started[body] = stack.enter_context(job)
        yield started


def test_a_hang_names_the_rank_that_does_not_wait(jobs):
    job = jobs[hangs]
    assert job.codes() == [1] * 3
    output = job.output()
    assert output.startswith("error: rank 1 (pid ") and "hangs: " in output
    seconds = re.search(r"hangs: (\d+) s in phase 'step 3: data'$", output.splitlines()[0])
    assert seconds is not None and int(seconds[1]) >= HANG
    cause, others = output.split("Last phase and main thread of every rank:\n")
    assert "# the line to be shown" in cause and "# the line" not in others
    assert "ranks 0, 2: in phase 'step 3: reduce'" in others and "dist.all_reduce" in others


def test_a_slow_start_is_no_hang(jobs):
    assert jobs[starts_slowly].codes() == [0, 0]
    assert jobs[starts_slowly].output() == "left\n" * 2


def test_a_phase_on_one_rank_may_be_allowed_longer_than_all_others_wait(jobs):
    assert jobs[saves_long].codes() == [0, 0]
    assert jobs[saves_long].output() == "left\n" * 2


def test_a_long_phase_of_the_rank_that_waits_hides_no_hang(jobs):
    assert jobs[hangs_before_a_save].codes() == [1, 1]
    assert jobs[hangs_before_a_save].output().startswith("error: rank 0 (pid ")


def test_an_error_of_a_collective_that_nothing_explains_is_told(jobs):
    assert jobs[loses_a_connection].codes() == [1, 1]
    output = jobs[loses_a_connection].output()
    assert output.startswith("error: rank 0 ") and "a lost peer is the likely cause" in output
    assert "rank 1: in phase 'working alone'" in output


def test_a_rank_that_leaves_by_sys_exit_is_the_first_cause(jobs):
    assert jobs[leaves_early].codes() == [1, 0]
    first, *rest = jobs[leaves_early].output().splitlines()
    assert first.startswith("error: rank 1 (pid ")
    assert first.endswith("ended by sys.exit(0) in phase 'step 3: data', and the others went on")
    assert any("sys.exit(0) if rank == 1" in line for line in rest)
    assert "rank 1: ended without error" in rest


def test_the_last_phase_of_a_killed_rank_is_the_one_it_died_in(jobs):
    assert jobs[dies_soon_after_a_new_phase].codes(0) == [1]
    assert "its last phase: going on" in jobs[dies_soon_after_a_new_phase].output().splitlines()[0]


def test_ranks_may_end_at_different_times(jobs):
    assert jobs[ends_at_different_times].codes() == [0, 0, 0]
    assert jobs[ends_at_different_times].output() == "left\n" * 3


def test_an_error_of_a_collective_is_not_the_first_cause(tmp_path):
    """Rank 0's collective fails at once, as the connection to rank 1 breaks; rank 1 tells what it has seconds later."""

    def body(rank, watch):
        train(rank, watch, tmp_path, steps=4)
        watch.phase("breaking")
        if rank == 1:
            dist.destroy_process_group()
            time.sleep(2)
            raise ZeroDivisionError("no rows")
        train(rank, watch, tmp_path)

    with Job(tmp_path, 2, body) as job:
        assert job.codes() == [1, 1]
    output = job.output()
    assert output.startswith("error: rank 1 ") and output.splitlines()[0].endswith("ZeroDivisionError: no rows")
    assert "rank 0: in phase 'step 0: reduce', raised an error as well" in output


def test_one_process_keeps_its_exceptions():
    with (
        pytest.raises(ZeroDivisionError),
        watched(
            rank=0,
            world_size=1,
            address=("127.0.0.1", 1),
            heartbeat_timeout_seconds=HEARTBEAT,
            hang_timeout_seconds=HANG,
            report=None,
        ) as watch,
    ):
        watch.phase("step 1: data")
        raise ZeroDivisionError


def test_under_torchrun_the_first_cause_is_named(torchruns):
    process, folder = torchruns["fail"]
    assert process.wait(60) == 1
    output = (folder / "output").read_text()
    assert "failed in phase 'step 3: forward': KeyError: 'no such expert'" in output
    assert "rank 0: in phase 'step 3: forward'" in output
    assert (folder / "failure.txt").read_text().startswith("error: rank 1 ")


def test_orphans_of_torchrun_learn_it_and_end_well_without_its_store(torchruns):
    launcher, folder = torchruns["orphan"]
    until(lambda: all((folder / f"started.{rank}").exists() for rank in (0, 1)))
    launcher.kill()
    launcher.wait()
    until(lambda: all((folder / f"ended.{rank}").exists() for rank in (0, 1)), seconds=30)
    told = [(folder / f"ended.{rank}").read_text() for rank in (0, 1)]
    assert f"torch.distributed.run (pid {launcher.pid})" in told
    assert "error: " not in (folder / "output").read_text()
    assert not (folder / "failure.txt").exists()
