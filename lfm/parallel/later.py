"""Products that wait: gradients of weights, which no other stage needs, made while a stage waits for its neighbours."""

from collections import deque
from collections.abc import Callable

import torch

Work = Callable[[], None]


class LaterProducts:
    """A queue of work in batches: what is put between two calls of `run` is one of them, a chunk's backward pass say.

    It keeps alive what its work reads, the inputs and output gradients of the products.
    """

    def __init__(self) -> None:
        self._batches: deque[list[Work]] = deque()
        self._open: list[Work] = []

    def __len__(self) -> int:
        """Batches, with the one that is being put together."""
        return len(self._batches) + bool(self._open)

    def put(self, work: Work) -> None:
        self._open.append(work)

    # Saved activations may require gradients themselves, and this runs outside of autograd's backward pass.
    @torch.no_grad()
    def run(self, *, keep: int = 0) -> None:
        """Oldest first, until `keep` batches are left."""
        if self._open:
            self._batches.append(self._open)
            self._open = []
        while len(self._batches) > keep:
            batch = self._batches.popleft()
            # One by one, so that each frees what it alone has read.
            batch.reverse()
            while batch:
                batch.pop()()

    def clear(self) -> None:
        """Forget all of it, after a step that did not end."""
        self._batches.clear()
        self._open.clear()
