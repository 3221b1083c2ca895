"""What stages send each other under megatron-core's schedules, and what they do meanwhile."""

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lfm.kernels.gradient_sum import gradient_sum
from lfm.parallel.groups import Groups
from lfm.parallel.later import LaterProducts
from lfm.parallel.links import Link

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class Transfers(P2PCommunicator):
    """megatron-core's communicator over links of our own.

    All is posted at once.  Then come weight gradients that wait in `later`, all but those of the last
    `layout.waiting_passes` backward passes, and of all of them once the last forward pass is made: a stage then does
    little but wait.  Then, where the schedule does not do that itself, the wait for what is received.  Nothing waits
    for what is sent.
    """

    def __init__(self, groups: Groups, config: TransformerConfig) -> None:
        super().__init__(groups.pipeline, config)
        assert groups.links is not None
        self.links, self.device = groups.links, groups.device
        self.later, self._keep = LaterProducts(), groups.layout.waiting_passes
        self.forward_passes = 0
        """That are still to come in this call of the schedule."""
        # More of a kind than ever are under way: the last of them arrived before its answer did.
        self._most_sent = 2 * groups.layout.pipeline * groups.layout.virtual_pipeline
        self._sent: dict[str, deque[tuple[dist.Work, Tensor]]] = {"send_next": deque(), "send_prev": deque()}
        self.collection = _collection(groups)

    def delay(self, weights: Iterable[Tensor]) -> None:
        """Let the gradients of these wait, where products add them to a `gradient_sum`."""
        for weight in weights:
            total = gradient_sum(weight)
            if total is not None:
                total.later = self.later

    def begin(self, forward_passes: int) -> None:
        """Before each call of the schedule."""
        # A call that an exception has left may have left work behind.
        self.later.clear()
        self.forward_passes = forward_passes

    def finish(self) -> None:
        """After it: no gradient waits any more, and nothing is under way."""
        self.later.run()
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()

    def _communicate(  # type: ignore[override]
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int] | None,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, dist.Work]]:
        self._send("send_next", tensor_send_next)
        self._send("send_prev", tensor_send_prev)
        works: dict[str, dist.Work] = {}
        activations = self._receive("recv_prev", tensor_shape, works) if recv_prev else None
        gradients = self._receive("recv_next", tensor_shape, works) if recv_next else None
        self.later.run(keep=self._keep if self.forward_passes > 0 else 0)
        if wait_on_reqs:
            for work in works.values():
                work.wait()
            works = {}
        return activations, gradients, works

    def _send(self, name: str, tensor: Tensor | None) -> None:
        sent = self._sent[name]
        while sent and (sent[0][0].is_completed() or len(sent) >= self._most_sent):
            sent.popleft()[0].wait()
        if tensor is not None:
            # The tensor stays alive as long as it is under way.
            sent.append((self._link(name).send(tensor), tensor))

    def _receive(self, name: str, shape: Any, works: dict[str, dist.Work]) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=self.config.pipeline_dtype, device=self.device, requires_grad=True)
        works[name] = self._link(name).receive(tensor)
        return tensor

    def _link(self, name: str) -> Link:
        link = getattr(self.links, name)
        assert link is not None, f"no {name} on this stage"
        return link


def _collection(groups: Groups) -> ProcessGroupCollection:
    """What the schedules take beside a communicator."""
    return ProcessGroupCollection(
        tp=groups.tensor,
        pp=groups.pipeline,
        cp=parallel_state.get_context_parallel_group(),
        embd=groups.embedding,
        pos_embd=None,
        dp_cp=groups.data,
    )
