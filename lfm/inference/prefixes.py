"""States after the beginnings of texts, kept so that a text which begins alike is not read again."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Kept:
    state: Any
    """After the last token; of caches, the keys and values of the last `every` tokens alone."""
    num_bytes: int


class Prefixes:
    """States after every whole number of `every` tokens, up to `max_bytes`; those not used for longest go first.

    A text is read in pieces of `every` tokens whether or not a state is found, so that what comes of it has the same
    bits either way.
    """

    def __init__(self, every: int, max_bytes: int) -> None:
        self.every, self.max_bytes = every, max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, ...], _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int]) -> tuple[int, Any]:
        """How many of `ids`, not all, have been read already, and the state after them; 0 and None: none."""
        found: list[_Kept] = []
        keys = [tuple(ids[:stop]) for stop in range(self.every, len(ids), self.every)]
        for key in keys:
            if key not in self._kept:
                break
            found.append(self._kept[key])
        if not found:
            return 0, None
        for key in reversed(keys[: len(found)]):  # the shorter ones last: without them the longer are of no use
            self._kept.move_to_end(key)
        return len(found) * self.every, _joined([kept.state for kept in found])

    def keep(self, ids: Sequence[int], state: Any) -> None:
        """The state after `ids`, a whole number of `every`."""
        assert len(ids) % self.every == 0
        key = tuple(ids)
        if key in self._kept or self.max_bytes == 0:
            return
        part = _last(state, self.every)
        size = part.num_bytes + 8 * len(key)
        if size > self.max_bytes:
            return
        self._kept[key] = _Kept(part, size)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.num_bytes


def _last(state: Any, count: int) -> Any:
    """A copy of a state of one row, of whose caches the last `count` places are left."""
    if getattr(state, "caches", []):
        caches = [replace(c, key=c.key[:, :, -count:], value=c.value[:, :, -count:]) for c in state.caches]
        state = replace(state, caches=caches)
    return state.map(Tensor.clone)


def _joined(states: Sequence[Any]) -> Any:
    """The last state, with all places of the caches."""
    last = states[-1]
    if not getattr(last, "caches", []):
        return last
    caches = []
    for pieces in zip(*(state.caches for state in states), strict=True):
        key, value = (torch.cat([getattr(piece, name) for piece in pieces], 2) for name in ("key", "value"))
        caches.append(replace(pieces[-1], key=key, value=value))
    return replace(last, caches=caches)
