"""One token of several sequences at a time: states beside each other in tensors that stay where they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.kernels.recording import capturing
from lfm.layers.attention import SlotCache
from lfm.models.decoder import Decoder
from lfm.models.language_model import LanguageModel
from lfm.talk import complain

CudaGraph = Literal["auto", "off"]

REHEARSALS = 2
"""Steps of a shape before its recording: they compile what it needs."""
_SHORTEST = 256
"""Positions that caches begin with; they double."""


@dataclass
class _Recording:
    calls: int = 0
    graph: Any = None
    logits: Tensor | None = None


class Rows:
    """States of the sequences that are being continued, the first `count` of `slots` rows.

    A step computes a power of two of rows, or with `fixed_width` always all: then the bits of a row do not depend on
    how many others there are.  Caches of keys and values double their positions when one is full.  On a CUDA device a
    step of each shape is recorded as a CUDA graph when it comes for the third time; one that cannot be is computed
    plainly, which is said once.
    """

    def __init__(
        self, model: LanguageModel, slots: int, *, fixed_width: bool = False, cuda_graph: CudaGraph = "auto"
    ) -> None:
        self.model, self.slots, self.fixed_width = model, slots, fixed_width
        self.count = 0
        self.lengths: list[int] = []
        """Tokens that each row has read."""
        self.device = model.embedding.weight.device
        self.records = cuda_graph == "auto" and self.device.type == "cuda"
        self._state: Any = None
        self._ids = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        moe = getattr(model.config, "moe", None)
        self._load: Tensor | None = None
        if moe is not None:
            layers = model.config.num_layers
            self._load = torch.zeros(slots, layers, moe.num_moe_experts, dtype=torch.long, device=self.device)
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._stream = torch.cuda.Stream(self.device) if self.records else None
        self._pool: Any = None

    @property
    def num_bytes(self) -> int:
        """Of the states of all slots."""
        return self._state.num_bytes if self._state is not None else 0

    @torch.no_grad()
    def join(self, state: Any, length: int) -> None:
        """Take in a sequence, whose `state` of one row is after `length` tokens, as the last row."""
        assert self.count < self.slots
        if self._state is None:
            self._state = self._storage(state, _SHORTEST)
        self._grow(length + 1)
        own, row = self._state.tensors(), self.count
        for name, tensor in state.tensors().items():
            if _is_cached(name):
                own[name][row, :, : tensor.shape[2]] = tensor[0]
            else:
                own[name][row] = tensor[0]
        if self._load is not None:
            self._load[row] = 0
        self.lengths.append(length)
        self.count += 1

    @torch.no_grad()
    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.count - 1
        if row != last:
            for name, tensor in self._state.tensors().items():
                if _is_cached(name):
                    tensor[row, :, : self.lengths[last]] = tensor[last, :, : self.lengths[last]]
                else:
                    tensor[row] = tensor[last]
            if self._load is not None:
                self._load[row] = self._load[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.count = last

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "n V"]:
        """Read one token in each row: fp32 logits of what follows, which the next step writes over."""
        assert len(tokens) == self.count > 0
        self._grow(max(self.lengths) + 1)
        self._ids[: self.count, 0] = torch.tensor(list(tokens), device=self.device)
        width = self.slots if self.fixed_width else min(self.slots, 1 << (self.count - 1).bit_length())
        caches = getattr(self._state, "caches", [])
        logits = self._run(width, caches[0].key.shape[2] if caches else 0)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[: self.count]

    def row_state(self, row: int) -> dict[str, Tensor]:
        """The tensors `[1, ...]` of a row's state, but for caches; views, by name."""
        return {name: t[row : row + 1] for name, t in self._state.tensors().items() if not name.startswith("caches.")}

    def load(self, row: int) -> Int[Tensor, "L E"] | None:
        """How often each expert of each layer was chosen for the row's continuation."""
        return self._load[row] if self._load is not None else None

    def _storage(self, like: Any, positions: int) -> Any:
        """Zeros for all slots, with the dtypes of the state of one row."""

        def zeros(name: str, tensor: Tensor) -> Tensor:
            shape = list(tensor.shape[1:])
            if _is_cached(name):
                shape[1] = positions
            return torch.zeros(self.slots, *shape, dtype=tensor.dtype, device=tensor.device)

        return like._map(zeros)

    def _grow(self, length: int) -> None:
        """Room for so many tokens in every cache."""
        caches = getattr(self._state, "caches", [])
        if not caches or caches[0].key.shape[2] >= length:
            return
        positions = caches[0].key.shape[2]
        while positions < length:
            positions *= 2
        limit = self.model.config.context_limit
        positions = min(positions, max(limit, length)) if limit is not None else positions
        self._recordings.clear()  # they read where the caches were
        for cache in caches:
            for name in ("key", "value"):
                old = getattr(cache, name)
                new = old.new_zeros(*old.shape[:2], positions, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(cache, name, new)

    def _compute(self, width: int) -> Float[Tensor, "width V"]:
        state = self._state.map(lambda tensor: tensor[:width])
        if getattr(state, "caches", []):
            padding = state.caches[0].key.shape[2] - state.position
            state = replace(state, caches=[SlotCache(cache.key, cache.value, padding) for cache in state.caches])
        routing: dict[int, Any] = {}
        if isinstance(self.model, Decoder):
            hidden, after, found = self.model.advance_and_diagnose(self._ids[:width], state)
            routing = found.routing
        else:
            hidden, after = self.model.advance(self._ids[:width], state)
        logits = self.model.logits(hidden[:, -1]).float()
        own = state.tensors()
        for name, tensor in after.tensors().items():
            if not name.startswith("caches."):  # which are written in place
                own[name].copy_(tensor)
        if self._load is not None:
            for layer, found in routing.items():
                self._load[:width, layer] += found.counts
        return logits

    def _run(self, width: int, positions: int) -> Tensor:
        if not self.records:
            return self._compute(width)
        found = self._recordings.setdefault((width, positions), _Recording())
        found.calls += 1
        if found.graph is None and found.calls > REHEARSALS:
            try:
                found.graph, found.logits = self._record(lambda: self._compute(width))
            except Exception as error:  # of CUDA, of a library or of a kernel's launcher: whatever does not record
                complain(f"steps are not recorded as CUDA graphs ({str(error).partition(chr(10))[0]}); it is slower")
                self.records = False
                torch.cuda.synchronize(self.device)
                return self._compute(width)
        if found.graph is None:
            return self._rehearsed(lambda: self._compute(width))
        found.graph.replay()
        assert found.logits is not None
        return found.logits

    def _rehearsed(self, compute: Callable[[], Tensor]) -> Tensor:
        """On the stream that is recorded on, where libraries then have what they need."""
        assert self._stream is not None
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            logits = compute()
        here.wait_stream(self._stream)
        return logits

    def _record(self, compute: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool=self._pool, stream=self._stream):
            logits = compute()
        self._pool = graph.pool()
        return graph, logits


def _is_cached(name: str) -> bool:
    """Whether a tensor of a state has a place for each token read."""
    return name.startswith("caches.") and name.endswith((".key", ".value"))
