"""Whether what runs now is, or will be, part of a step that is recorded whole: then nothing waits for the device.

An op that must know whether its result is good enough leaves that to whoever records, who makes the step again where it
is not.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Of the process and not of a thread: a backward pass runs in threads of its own.
_verdicts: list[Tensor] | None = None


def is_recording() -> bool:
    return _verdicts is not None


def judge_later(verdict: Tensor) -> None:
    """Within `recording`: a bool `[]` that says whether a result may be used."""
    assert _verdicts is not None
    _verdicts.append(verdict)


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """Within it results are used unjudged; gives the verdicts on them, on the device."""
    global _verdicts
    assert _verdicts is None, "a recording inside a recording"
    _verdicts = []
    try:
        yield _verdicts
    finally:
        _verdicts = None


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, within which Python collects no garbage: what it would free, tensors of other threads too,
    does not belong into a recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def not_recording() -> Iterator[None]:
    """Within it results are judged at once, inside `recording` too: of a kernel's comparison with its reference."""
    global _verdicts
    kept, _verdicts = _verdicts, None
    try:
        yield
    finally:
        _verdicts = kept
