"""Rows on their way to experts that other processes hold, and back; how many, beforehand."""

import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel import mappings


class Counts:
    """How many rows leave for every process and arrive from it, on their way to the host: an exchange needs its sizes.

    That is a layer's one wait for the device.  On a GPU they travel beside the current stream, whose kernels keep the
    device busy until `read`, so that it waits for the host in turn as little as can be.
    """

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        """`sent` `[destination, its experts]`."""
        self.sent = sent.contiguous()
        self.arriving = torch.empty_like(self.sent)
        """`[source, experts of here]`, on the device; the current stream may use it after `read`."""
        work = dist.all_to_all_single(self.arriving, self.sent, group=group, async_op=True)
        assert work is not None
        self._event: torch.cuda.Event | None = None
        if not sent.is_cuda:
            work.wait()
            self._both = self._sums()
            return
        with torch.cuda.stream(_beside(sent.device)):
            work.wait()
            both = self._sums()
            self._both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._both.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def _sums(self) -> Tensor:
        return torch.stack([self.sent.sum(1), self.arriving.sum(1)])

    def read(self) -> tuple[list[int], list[int]]:
        """Rows to every process, and from it."""
        if self._event is not None:
            self._event.synchronize()
        to_each, from_each = self._both.tolist()
        return to_each, from_each


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def exchange(rows: Tensor, from_each: list[int], to_each: list[int], group: dist.ProcessGroup) -> Any:
    """`[sum(to_each), D]`, grouped by destination, -> `[sum(from_each), D]`, by source; gradients travel back."""
    return mappings.all_to_all(group, rows, from_each, to_each)
