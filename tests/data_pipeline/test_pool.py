"""Little is imported here, because each process imports what it needs to find the functions."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from data_pipeline.pool import ordered_map
from lfm.errors import UserError


def negated(item: int) -> int:
    if item == 3:
        raise UserError("three is wrong")
    if item == 5:
        raise KeyError("a bug")
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * (item % 2))
    return -item


def endless() -> Iterator[int]:
    i = 10
    while True:
        yield i
        i += 1


def test_results_come_in_order():
    assert list(ordered_map(negated, range(10, 40), 3)) == list(range(-10, -40, -1))


@pytest.mark.parametrize(
    "items, error, words",
    [
        ([1, 2, 3], UserError, "three is wrong"),
        ([5], RuntimeError, "KeyError: 'a bug'"),
        ([1, 7, 2], UserError, r"ended by signal 9 \(SIGKILL\).* set num_workers"),
    ],
    ids=["mistake", "bug", "killed"],
)
def test_errors_come_as_they_are(items, error, words):
    with pytest.raises(error, match=words):
        list(ordered_map(negated, items, 1))


def test_stopping_early_ends_the_processes():
    results = ordered_map(negated, endless(), 2)
    assert next(results) == -10
    children = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "data_pipeline.pool"], capture_output=True, text=True
    )
    assert len(children.stdout.split()) == 2
    results.close()  # type: ignore[attr-defined]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children.stdout.split())
