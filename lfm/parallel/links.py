"""One communicator for each direction between neighbouring pipeline stages."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lfm.layout.layout import Layout


@dataclass(frozen=True)
class Link:
    """Messages of one kind from one process to another, which arrive in the order in which they are sent."""

    group: dist.ProcessGroup
    peer: int
    """Global rank of the other end."""

    def send(self, tensor: torch.Tensor) -> dist.Work:
        work = dist.isend(tensor, dst=self.peer, group=self.group)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor) -> dist.Work:
        work = dist.irecv(tensor, src=self.peer, group=self.group)
        assert work is not None
        return work


@dataclass(frozen=True)
class Links:
    """This process's, None where no message passes.

    With several messages under way, those to a neighbour must not queue behind those from it, nor activations behind
    gradients: one communicator for all of them can come to a standstill, and two stages' activations and gradients
    that wrap around would be taken for each other.
    """

    send_next: Link | None = None
    recv_prev: Link | None = None
    send_prev: Link | None = None
    recv_next: Link | None = None


def make_links(layout: Layout, pipeline: list[int], device: torch.device) -> Links | None:
    """Collective over all processes; `pipeline` holds the global ranks of this process's stages.

    None without a pipeline.  Each link carries one element here: communicators that are made at their first use, in an
    order of each process's own, can wait for each other for ever.
    """
    if layout.pipeline == 1:
        return None
    a_stage = layout.world // layout.pipeline
    rank = dist.get_rank()
    assert pipeline == list(range(rank % a_stage, layout.world, a_stage)), "megatron-core numbers stages otherwise"
    links = Links()
    for source, target, forward in _pairs(layout):
        # All pipelines' in the same order on every process, as making a group asks.
        for first in range(a_stage):
            ends = [stage * a_stage + first for stage in (source, target)]
            group = dist.new_group(ends)
            if rank not in ends:
                continue
            assert isinstance(group, dist.ProcessGroup)
            one = torch.zeros(1, device=device)
            if rank == ends[0]:
                link = Link(group, ends[1])
                link.send(one).wait()
                links = dataclasses.replace(links, **{"send_next" if forward else "send_prev": link})
            else:
                link = Link(group, ends[0])
                link.receive(one).wait()
                links = dataclasses.replace(links, **{"recv_prev" if forward else "recv_next": link})
    return links


def _pairs(layout: Layout) -> Iterator[tuple[int, int, bool]]:
    """(source, target, forward) of every link between stages; chunks wrap around where stages have several."""
    stages = layout.pipeline
    for source in range(stages):
        for forward in (True, False):
            target = source + 1 if forward else source - 1
            if 0 <= target < stages or layout.virtual_pipeline > 1:
                yield source, target % stages, forward
