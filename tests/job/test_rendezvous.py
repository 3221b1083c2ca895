"""Ranks that meet, do not come, die, fail alone or are stopped before all have met: real processes and signals."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm.errors import UserError
from lfm.exits import command
from lfm.job import rendezvous
from lfm.job.process import Process
from lfm.job.rendezvous import Stopped, meet, one_voice
from tests.launch.job import bare, free_port


def run_rank(rank: int, world_size: int, port: int, folder: Path, body: Callable[[int], None]) -> None:
    log = os.open(folder / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(bare(rank, world_size, port))
    code: object = 0
    try:
        command(one_voice()(lambda: body(rank)))()
    except SystemExit as end:
        code = end.code
    os._exit(code if isinstance(code, int) else 1)


class Ranks:
    """Forked ranks, some of a larger job; their output and exit codes."""

    def __init__(self, folder: Path, world_size: int, body, *, ranks: tuple[int, ...] = ()) -> None:
        self.folder, port, self.started = folder, free_port(), time.monotonic()
        fork = multiprocessing.get_context("fork")
        self.ranks = {
            rank: fork.Process(target=run_rank, args=(rank, world_size, port, folder, body))
            for rank in ranks or range(world_size)
        }
        for process in self.ranks.values():
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for process in self.ranks.values():
            process.kill()
            process.join()

    def codes(self, within: float = 40) -> list[int | None]:
        deadline = time.monotonic() + within
        for process in self.ranks.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks.values()]

    @property
    def output(self) -> list[str]:
        return (self.folder / "output").read_text().splitlines()


def come(limit_seconds: float = 60, **handled: int) -> None:
    """Meet; a signal in `handled` ends it, with code 0, as it does in training."""
    received: list[str] = []
    for name, number in handled.items():
        signal.signal(number, lambda *_, name=name: received.append(name))
    with contextlib.suppress(Stopped):
        store = meet(Process.from_environment(), limit_seconds=limit_seconds, why_stop=lambda: (received or [None])[0])
        print("met", flush=True)
        time.sleep(1)  # in training a next meeting follows, over the store
        del store


def fails_alone(rank: int, *, late: float = 0, first: int = 1) -> None:
    if rank == first:
        time.sleep(late)
        raise UserError("--config /none does not exist")
    come()


ALONE = {
    "rank 1": (1, 0.0),
    "rank 1 before rank 0 is there": (1, -1.0),
    "rank 0": (0, 0.0),
    "rank 2, when the others wait": (2, 2.0),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_rank_that_fails_alone_says_so_and_the_others_end_with_it(case, tmp_path):
    failing, late = ALONE[case]

    def body(rank):
        if late < 0 and rank != failing:
            time.sleep(2)
        fails_alone(rank, first=failing, late=max(0.0, late))

    with Ranks(tmp_path, 3, body) as job:
        assert job.codes(within=15) == [2, 2, 2]
    prefix = f"rank {failing}: " if failing else ""
    assert job.output == [f"error: {prefix}--config /none does not exist"]


@pytest.mark.slow
def test_a_mistake_of_all_ranks_is_said_once(tmp_path):
    def body(rank):
        time.sleep([1, 0, 2][rank])
        raise UserError("data.path=/none does not exist")

    with Ranks(tmp_path, 3, body) as job:
        assert job.codes(within=15) == [2, 2, 2]
    (line,) = job.output
    assert line.endswith("data.path=/none does not exist")


def test_a_bug_of_one_rank_keeps_its_traceback_and_ends_the_others(tmp_path):
    def body(rank):
        if rank == 1:
            raise ZeroDivisionError
        come()

    with Ranks(tmp_path, 2, body) as job:
        job.ranks[0].join(15)
        assert job.ranks[0].exitcode == 1


@pytest.mark.slow
def test_without_the_others_a_rank_speaks_in_seconds(tmp_path, monkeypatch):
    assert rendezvous.SPEAK_SECONDS <= 5
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", rendezvous.SPEAK_SECONDS + 1)
    with Ranks(tmp_path, 2, fails_alone, ranks=(1,)) as job:
        assert job.codes(within=15) == [2]
    assert job.output == ["error: rank 1: --config /none does not exist"]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["one rank is missing", "all others are missing"])
def test_a_signal_ends_those_that_wait_at_once(name, ranks, tmp_path):
    number = getattr(signal, name)
    with Ranks(tmp_path, 3, lambda rank: come(**{name: number}), ranks=ranks) as job:
        time.sleep(1)
        os.kill(job.ranks[1].pid, number)
        assert job.codes(within=5) == [0] * len(ranks)


def test_who_did_not_come_is_named_by_one_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_SAY_SECONDS", 1.0)
    with Ranks(tmp_path, 4, lambda rank: come(limit_seconds=2), ranks=(0, 2)) as job:
        assert job.codes(within=15) == [2, 2]
    *waiting, error = job.output
    assert len(waiting) == 1 and "rank 0 at 127.0.0.1" in waiting[0] and "waits for ranks 1, 3: 1 of 2 s" in waiting[0]
    assert error.startswith("error: ranks 1, 3 of 4 did not come to 127.0.0.1:")
    assert "in 2 s; " in error and "raise parallel.rendezvous_timeout_seconds" in error


def test_a_missing_rank_0_is_named(tmp_path):
    with Ranks(tmp_path, 2, lambda rank: come(limit_seconds=2), ranks=(1,)) as job:
        while not (tmp_path / "output").exists() or not job.output:
            time.sleep(0.1)
    assert job.output[0].startswith("error: rank 1 of 2 found nobody at 127.0.0.1:") and "refused" in job.output[0]


def test_ranks_whose_torchrun_was_killed_before_they_met_end_soon(tmp_path, monkeypatch):
    """It is nobody's parent any more when they look for it, and would answer at once if it were there."""
    monkeypatch.setattr(rendezvous, "SILENT_SECONDS", 1.0)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with Ranks(tmp_path, 2, lambda rank: come()) as job:
        assert job.codes(within=20) == [2, 2]
    assert len(job.output) == 2 and all("has lost torchrun, which hosts" in line for line in job.output)


@pytest.mark.parametrize("killed", [1, 0], ids=["rank 1", "rank 0, which hosts the store"])
def test_a_rank_killed_while_others_are_missing_is_noticed(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 1.0)
    with Ranks(tmp_path, 3, lambda rank: come(), ranks=(0, 1)) as job:
        time.sleep(1)
        job.ranks[killed].kill()
        job.ranks[1 - killed].join(10)
        assert job.ranks[1 - killed].exitcode == 2
    words = f"error: rank 1 (pid {job.ranks[1].pid}, host " if killed else "error: rank 1 of 3 lost the job's store at "
    (error,) = (line for line in job.output if line.startswith("error: "))  # torch adds words of its own
    assert error.startswith(words)


def test_an_address_that_cannot_be_resolved_is_one_sentence_at_once(tmp_path):
    def body(rank):
        os.environ["MASTER_ADDR"] = "no-such-host.invalid"
        come()

    with Ranks(tmp_path, 2, body, ranks=(0,)) as job:
        assert job.codes(within=15) == [2]
    (line,) = job.output
    assert line.startswith("error: MASTER_ADDR=no-such-host.invalid with MASTER_PORT=") and "is no address (" in line


def test_a_port_of_another_program_is_one_sentence(tmp_path):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        process = Process(0, 2, address="127.0.0.1", port=other.getsockname()[1])
        with pytest.raises(UserError, match=r"rank 0 of 2 cannot meet the others at 127.* \(.*already in use"):
            meet(process, limit_seconds=1)


def test_all_that_come_meet(tmp_path):
    with Ranks(tmp_path, 3, lambda rank: come()) as job:
        assert job.codes(within=15) == [0, 0, 0]
    assert job.output == ["met"] * 3
