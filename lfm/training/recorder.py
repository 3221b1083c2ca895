"""Whole steps without the host: functions of the device alone, recorded once as CUDA graphs and replayed.

A recorded function reads tensors that stay where they are; whoever replays it writes new numbers into those first.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from lfm.kernels.recording import capturing
from lfm.layers.documents import Documents, NeedsTheHost, Rows

CudaGraph = Literal["auto", "off", "required"]

REHEARSALS = 2
"""Calls before a recording: the first compiles what it needs, the second shows whether anything waits for the host."""
_MOST_RECORDINGS = 12
"""Kept at once, in one pool of memory; shapes are few, and warm-ups of reservoirs move by notches."""

_ROOM = 3
"""Times what a step takes: a recording of LFM-3B took 1.16 times as much, and a step is to fit beside it."""

T = TypeVar("T")


class CannotRecord(Exception):
    """Why a step is not replayed, as words after "because"."""


@dataclass
class _Recording(Generic[T]):
    calls: int = 0
    replay: Callable[[], None] | None = None
    found: T | None = None


class Recorder:
    """Runs functions by key: a first few calls as they are, then from a recording.

    Elsewhere than on a CUDA GPU a recording is the function itself, called again: so a CPU computes what a GPU replays.
    """

    def __init__(self, device: torch.device, *, careful: bool = False) -> None:
        """careful: nothing is recorded where what a recording keeps leaves too little for what runs beside it."""
        self.device, self.careful = device, careful
        self._recordings: OrderedDict[Hashable, _Recording[Any]] = OrderedDict()
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.replays = device.type == "cuda"

    def run(self, key: Hashable, function: Callable[[], T], *, may_wait: bool = False) -> T:
        """What `function` returns.  Of a replay that is what the recording returned, whose tensors hold new numbers.

        `may_wait`: rehearsals are not watched for what waits for the host.  Raises CannotRecord, having made part of a
        rehearsal or nothing.
        """
        found = self._recordings.setdefault(key, _Recording())
        self._recordings.move_to_end(key)
        if len(self._recordings) > _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        found.calls += 1
        if not self.replays or found.calls <= REHEARSALS:
            try:
                with self._rehearsing(watched=found.calls > 1 and not may_wait):
                    return function()
            except torch.OutOfMemoryError as error:
                if not any(each.replay for each in self._recordings.values()):
                    raise
                raise CannotRecord(
                    "a step does not fit into the device's memory beside recordings of others"
                ) from error
        if found.replay is None:
            if self.careful and self._pool is None:
                self._require_room()
            found.found, found.replay = self.record(function)
        found.replay()
        assert found.found is not None
        return found.found

    @contextlib.contextmanager
    def _rehearsing(self, *, watched: bool) -> Iterator[None]:
        """On the stream that recordings are made on, where libraries then have what they need."""
        if self._stream is None:
            with _told_apart():
                yield
            return
        here, before = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), _told_apart():
                if watched:
                    torch.cuda.set_sync_debug_mode("error")
                yield
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            raise CannotRecord(f"something in it waits for the device ({_first_line(error)})") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
            here.wait_stream(self._stream)

    def _require_room(self) -> None:
        """Recordings keep the memory that they compute in; rehearsals of further kinds of rows, and evaluation, take as
        much again, and none of it fits into the gaps of the other."""
        held, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - held
        if free < _ROOM * (most - held):
            raise CannotRecord(
                f"a step takes {(most - held) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the device are left, not "
                f"{_ROOM} times as much; training.cuda_graph=required tries it"
            )

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `function` returned, and what replays it."""
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"stream": self._stream}
        if self._pool is not None:
            options["pool"] = self._pool
        try:
            # The backward of autograd runs in a thread of its own, on the same stream.
            with capturing(graph, **options), _told_apart():
                found = function()
        except CannotRecord:
            raise
        except Exception as error:  # of CUDA, of a library or of a kernel's launcher: whatever does not record
            raise CannotRecord(f"its recording fails ({type(error).__name__}: {_first_line(error)})") from error
        self._pool = graph.pool()
        return found, graph.replay


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except NeedsTheHost as error:
        raise CannotRecord(str(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class FixedRows:
    """Rows of one kind in tensors of a device that stay where they are; they are loaded from the host."""

    def __init__(self, like: Rows, device: torch.device) -> None:
        def blank(x: Tensor) -> Tensor:
            return torch.empty_like(x, device=device, memory_format=torch.contiguous_format)

        documents = like.documents
        self._ids, self._positions = blank(like.ids), blank(documents.positions)
        self._mask = None if documents.label_mask is None else blank(documents.label_mask)
        self._extras = {name: blank(x) for name, x in like.extras.items()}
        self._one_each = documents.row_is_one_document
        boundaries = documents.boundaries.new_full((_boundaries(like),), like.ids.numel())
        if self._one_each:  # those of all such rows, as their positions are
            boundaries.copy_(documents.boundaries)
            self._positions.copy_(documents.positions)
        self._boundaries = boundaries.to(device)

    @staticmethod
    def kind(rows: Rows) -> Hashable:
        """What rows must have in common to be loaded into the same tensors."""
        d = rows.documents
        extras = tuple((name, x.shape, x.dtype) for name, x in sorted(rows.extras.items()))
        return rows.ids.shape, d.row_is_one_document, d.label_mask is not None, _boundaries(rows), extras

    def load(self, rows: Rows) -> Rows:
        """With the numbers of `rows`, which are of this kind; what a recorded function is given."""
        d = rows.documents
        _send(rows.ids, self._ids)
        if self._mask is not None and d.label_mask is not None:
            _send(d.label_mask, self._mask)
        for name, x in self._extras.items():
            _send(rows.extras[name], x)
        if not self._one_each:
            _send(d.positions, self._positions)
            boundaries = d.boundaries.new_full(self._boundaries.shape, rows.ids.numel())
            boundaries[: len(d.boundaries)] = d.boundaries  # documents beyond the last are empty
            _send(boundaries, self._boundaries)
        documents = Documents.on_device(
            self._positions,
            row_is_one_document=self._one_each,
            label_mask=self._mask,
            boundaries=self._boundaries,
        )
        return Rows(self._ids, documents, self._extras)


def _send(x: Tensor, to: Tensor) -> None:
    # From other memory a copy begins when the device has nothing else to do, and the host waits for that.
    to.copy_(x.pin_memory() if to.is_cuda else x, non_blocking=True)


def _boundaries(rows: Rows) -> int:
    """How many document boundaries such rows are given, so that kinds are few: a power of two and one."""
    count = sum(map(len, rows.documents.lengths))
    return (count if rows.documents.row_is_one_document else 1 << (count - 1).bit_length()) + 1
