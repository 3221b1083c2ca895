"""What the processes of a run settle between them besides gradients: who decides, who failed, who wants to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lfm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """By default there is one process.  `group` is a gloo group of all: agreeing never waits for a GPU."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run and changes its folder."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.group is None:
            return number
        shared = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all; an error of it leaves rank 0 alone."""
        if self.group is None:
            return work()
        shared: list[Any] = [work() if self.is_main else None]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this process; a UserError or OSError of any process is raised on all, so that all can save."""
        if self.group is None:
            return work()
        result, error = None, None
        try:
            result = work()
        except (UserError, OSError) as failed:
            error = failed
        if self.largest(error is not None) == 0:
            return result  # type: ignore[return-value]
        found: list[str | None] = [None] * self.world_size
        dist.all_gather_object(found, None if error is None else str(error), group=self.group)
        raise UserError(next(text for text in found if text is not None)) from error
