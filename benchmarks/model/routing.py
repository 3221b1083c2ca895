"""Forced balance: a router whose choice is replaced, so that every expert gets equally many tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lfm.kernels.router.op import Choice
from lfm.layers import router


def round_robin(batch: int, length: int, num_experts: int, top_k: int, device: torch.device) -> Tensor:
    """Experts int64 `[batch, length, top_k]` in turn, so that the loads of a row differ by 1 at most."""
    turns = torch.arange(length * top_k, device=device).view(length, top_k) % num_experts
    return turns.expand(batch, length, top_k)


@contextmanager
def forced_balance() -> Iterator[None]:
    """Within it tokens take experts in turn.

    All kernels of the router run as ever, forward and backward: only which experts it chose, and their load, are
    replaced.  Its weights are those of the experts that it would have chosen.
    """
    choose = router.choose_experts

    def balanced(logits: Tensor, top_k: int, *rest: Tensor | None) -> Choice:
        choice = choose(logits, top_k, *rest)
        B, T, E = logits.shape
        experts = round_robin(B, T, E, top_k, logits.device)
        each, more = divmod(T * top_k, E)
        load = torch.full_like(choice.load, each)
        load[:, :more] += 1
        return choice._replace(experts=experts.contiguous(), load=load)

    router.choose_experts = balanced
    try:
        yield
    finally:
        router.choose_experts = choose
