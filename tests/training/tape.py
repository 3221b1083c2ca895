"""A recording on a CPU that has what makes a CUDA graph hard: addresses and constants stay, and no number is read."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfm.training.recorder import CannotRecord, Recorder

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
"""Ops whose result goes to the host."""


class _Tape(TorchDispatchMode):
    """Notes ops with the tensors that they were given and gave, all of which stay alive."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor], bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise CannotRecord(f"something in it waits for the device ({func})")
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        fresh = [x for x in made if x.untyped_storage().data_ptr() not in given]
        is_view = bool(made) and not fresh and not func._schema.is_mutable
        # An op that gives its result now as a view and now as a copy would be neither at a replay.
        assert len(fresh) in (0, len(made)) or func._schema.is_mutable, func
        if not is_view:
            self.ops.append((func, args, kwargs or {}, fresh, torch.is_grad_enabled()))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh, with_grad in self.ops:
            # Some ops keep something for a backward pass, or not; there is none of a replay.
            with torch.set_grad_enabled(with_grad), torch._C._AutoDispatchBelowAutograd():
                again = func(*args, **kwargs)
            if fresh:
                made = [x for x in tree_leaves(again) if isinstance(x, torch.Tensor)]
                with torch.no_grad():
                    for old, new in zip(fresh, made, strict=True):
                        old.copy_(new)


class TapeRecorder(Recorder):
    """Replays on a CPU, op by op, into the tensors that the recording left."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.replays = True
        self.replayed = 0

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with _Tape() as tape:
            found = function()
        is_made = True  # this recording computes, unlike a CUDA graph's: the replay that follows has nothing to do

        def replay() -> None:
            nonlocal is_made
            if not is_made:
                tape.replay()
                self.replayed += 1
            is_made = False

        return found, replay
