"""Rows on their way to experts that other processes hold, and back, sorted by expert on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Span = tuple[int, int]
"""First row, number of rows."""


@dataclass(frozen=True)
class Routes:
    """Where rows lie here before and after an exchange, by other process and, within it, by expert in rising order."""

    leaving: Sequence[Sequence[Span]]
    arriving: Sequence[Sequence[Span]]

    @staticmethod
    def to_experts(sent: Sequence[Sequence[int]], arriving: Sequence[Sequence[int]]) -> "Routes":
        """`sent[d][e]`: how many rows go to expert e of process d; `arriving[s][e]`: how many from process s to e here.

        Rows leave sorted by process and expert; they arrive sorted by expert and, within it, by source.
        """
        experts, sources = range(len(arriving[0])), range(len(arriving))
        leaving = _spans([n for to_one in sent for n in to_one])
        by_expert = _spans([arriving[s][e] for e in experts for s in sources])
        return Routes(
            [leaving[d * len(experts) :][: len(experts)] for d in range(len(sent))],
            [[by_expert[e * len(sources) + s] for e in experts] for s in sources],
        )

    def back(self) -> "Routes":
        return Routes(self.arriving, self.leaving)


def _spans(counts: Sequence[int]) -> list[Span]:
    return list(zip(accumulate(counts, initial=0), counts, strict=False))


class Counts:
    """How many rows leave for and arrive at every expert, on their way to the host: an exchange needs its sizes there.

    That is a layer's one wait for the device.  On a GPU they travel beside the current stream, whose kernels keep the
    device busy until `read`, so that it waits for the host in turn as little as can be.
    """

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        """`sent` `[destination, its experts]`."""
        self.sent = sent.contiguous()
        self.arriving = torch.empty_like(self.sent)
        """`[source, experts of here]`, on the device."""
        work = dist.all_to_all_single(self.arriving, self.sent, group=group, async_op=True)
        assert work is not None
        self._event: torch.cuda.Event | None = None
        if not sent.is_cuda:
            work.wait()
            self._both = torch.stack([self.sent, self.arriving])
            return
        with torch.cuda.stream(_beside(sent.device)):
            work.wait()
            both = torch.stack([self.sent, self.arriving])
            self._both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._both.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list[list[int]]]:
        """`sent` and `arriving`; the current stream may use `arriving` then."""
        if self._event is not None:
            self._event.synchronize()
        return self._both.tolist()


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def exchange(rows: Tensor, routes: Routes, group: dist.ProcessGroup) -> Tensor:
    """`[leaving, D]` -> `[arriving, D]`; gradients travel back the same way.  All processes of the group take part."""
    return _Exchange.apply(rows, routes, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routes: Routes, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.routes, ctx.group = routes, group
        return travel(rows, routes, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return travel(grad_outputs[0], ctx.routes.back(), ctx.group), None, None


def travel(rows: Tensor, routes: Routes, group: dist.ProcessGroup) -> Tensor:
    """`exchange` without gradients: one message for every pair of process and expert that has rows, all posted at once.

    Each lands where it is wanted, so that nothing is sorted again.  Rows that stay are copied meanwhile: an all-to-all
    would send them through its own buffers.
    """
    rows = rows.contiguous()
    arrived = rows.new_empty(sum(n for spans in routes.arriving for _, n in spans), rows.shape[1])
    here, messages = group.rank(), []
    for other in range(group.size()):
        if other == here:
            continue
        # The same order on both sides, where NCCL matches what is sent with what is received; gloo has tags.
        for tag, (start, n) in enumerate(routes.leaving[other]):
            if n:
                messages.append(dist.P2POp(dist.isend, rows[start : start + n], None, group, tag, other))
        for tag, (start, n) in enumerate(routes.arriving[other]):
            if n:
                messages.append(dist.P2POp(dist.irecv, arrived[start : start + n], None, group, tag, other))
    under_way = dist.batch_isend_irecv(messages) if messages else []
    for (start, n), (new_start, _) in zip(routes.leaving[here], routes.arriving[here], strict=True):
        arrived[new_start : new_start + n] = rows[start : start + n]
    for work in under_way:
        work.wait()
    return arrived
