"""The skeleton of lfm, transformer, liquidnet and laerc: embedding, blocks, final norm, head; whole or in pieces."""

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfm.kernels.reservoir import RecurrenceStats
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.residual import ResidualStream
from lfm.layers.rotary import rotary_tables
from lfm.layers.router import Routing, router_losses
from lfm.layers.stored import Stored
from lfm.models.language_model import LanguageModel, Recompute
from lfm.models.losses import Losses, Measurements, Objective, reservoir_measurements, router_measurements
from lfm.models.state import State

Memory = Any
"""What one layer carries from the tokens before, in its family's own form; None: nothing."""


@dataclass(frozen=True)
class Context:
    """What is the same for all layers of one pass."""

    documents: Documents | None
    """None: the rows go on from a state, or each is one document."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Of the positions, in families that rotate."""
    streaming: bool = False
    """Layers keep what comes after them needs, and recurrences are exact: rows may be read in pieces."""
    recompute: Recompute = "none"

    @functools.cached_property
    def starts(self) -> Bool[Tensor, "B T"] | None:
        """Where a document begins, if rows may hold several."""
        return self.documents.starts if self.documents is not None else None


@dataclass
class Diagnostics:
    """What the layers that are here found in one forward pass, by layer."""

    routing: dict[int, Routing]
    recurrence: dict[int, RecurrenceStats]

    def sums(self, num_layers: int) -> dict[str, Float[Tensor, ""]]:
        """Of the routers' losses over rows, and of their mean over all layers of the model: the summands from here."""
        if not self.routing:
            return {}
        losses = router_losses([*self.routing.values()])
        return {"balance_loss": losses.balance.sum() / num_layers, "z_loss": losses.z.sum() / num_layers}

    def measure(self) -> Measurements:
        """Of this pass and its backward."""
        routers = router_measurements(self.routing) if self.routing else {}
        return routers | reservoir_measurements(self.recurrence)


class Block(nn.Module):
    """One layer."""

    @abstractmethod
    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, Routing | None]:
        """The stream behind the layer, what it carries on, and where its tokens were sent if it has experts."""


class Decoder(LanguageModel):
    """Blocks between an embedding and a head, which may be tied.

    `layers` makes it a piece of the model: those layers alone, with the embedding if they begin at the first and the
    head if they end at the last.  Modules carry global layer numbers, so a piece's names are the whole model's.
    """

    @property
    def attends(self) -> bool:
        """Whether layers attend, to rotated keys: then the config has `head_size` and `attention`, a state
        `position`."""
        return False

    def __init__(self, config: Any, *, parts: Parts = PLAIN, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        layers = range(config.num_layers) if layers is None else layers
        self.is_first, self.is_last = layers[0] == 0, layers[-1] == config.num_layers - 1
        if self.is_first or (self.is_last and config.is_tied):
            self.embedding = parts.vocabulary_embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): self.make_block(layer) for layer in layers})
        if self.is_last:
            self.final_norm = self.make_norm()
            self.head = Head(
                config.hidden_size,
                config.vocab_size,
                stored_rows=config.padded_vocab_size,
                tied_to=self.embedding if config.is_tied else None,
                multiplier=getattr(config, "logit_multiplier", 1.0),
                parts=parts,
            )

    def stored(self) -> dict[str, Stored]:
        """Of the tensors that no layer of ours holds; see `lfm.models.global_names`."""
        return {"embedding.weight": Stored("embedding.weight", cut=0)} if hasattr(self, "embedding") else {}

    @abstractmethod
    def make_block(self, layer: int) -> Block: ...

    @abstractmethod
    def make_norm(self) -> nn.Module: ...

    @abstractmethod
    def blank_state(self, batch: int, length: int) -> State:
        """A state after `length` tokens: its shapes and dtypes."""

    @abstractmethod
    def memories(self, state: Any) -> dict[int, Memory]:
        """What each layer carries, from a state of this family."""

    @abstractmethod
    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> State:
        """The state after tokens at these positions."""

    def empty_state(self, batch: int) -> State | None:
        device = self.embedding.weight.device
        return self.blank_state(batch, 0).map(lambda blank: torch.zeros_like(blank, device=device))

    def advance(
        self, ids: Int[Tensor, "B T"], state: Any = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        hidden, state, _ = self.advance_and_diagnose(ids, state, documents)
        return hidden, state

    def advance_and_diagnose(
        self, ids: Int[Tensor, "B T"], state: Any = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any, Diagnostics]:
        """As `advance`, and what the layers found."""
        assert state is None or documents is None
        memories, positions = None, None
        if state is not None:
            state.check_like(self.blank_state(len(ids), _length(state)))
            memories = self.memories(state)
        if self.attends and state is not None:
            positions = state.position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        elif self.attends:
            documents = documents or Documents.whole_rows(ids.shape[0], ids.shape[1], ids.device)
            positions = documents.positions
        x = self.embed(ids)
        context = Context(documents, self._rotary(positions, x.dtype), streaming=True)
        x, memories, found = self.run(x, context, memories)
        return self.final_norm(x), self.state(memories, positions), found

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        x = self.embed(rows.ids)
        x, _, found = self.run(x, self.context(rows, x.dtype, recompute=recompute))
        yield Losses(self.sums(x, rows, objective) | found.sums(self.config.num_layers), found.measure)

    def embed(self, ids: Int[Tensor, "B whole_T"]) -> Float[Tensor, "B T D"]:
        """What the first layer takes."""
        x, multiplier = self.embedding(ids), getattr(self.config, "embedding_multiplier", 1.0)
        return x if multiplier == 1.0 else x * multiplier

    def context(self, rows: Rows, dtype: torch.dtype, *, recompute: Recompute = "none") -> Context:
        """Of whole rows, whose hidden states are of this dtype."""
        rotary = self._rotary(rows.documents.positions, dtype)
        return Context(rows.documents, rotary, recompute=recompute)

    def run(
        self, x: Float[Tensor, "B T D"], context: Context, memories: Mapping[int, Memory] | None = None
    ) -> tuple[Float[Tensor, "B T D"], dict[int, Memory], Diagnostics]:
        """The layers that are here: what the next one takes, what each carries on, what they found."""
        found = Diagnostics({}, {layer: RecurrenceStats() for layer in self.liquids})
        stream, after = ResidualStream(x), {}
        run = plain
        if context.recompute == "full":
            run = checkpointed
        for layer, block in ((int(name), block) for name, block in self.layers.items()):
            if context.recompute == "full":
                stream = ResidualStream(stream.summed())
            before = memories.get(layer) if memories is not None else None
            stream, memory, routing = run(block, stream, context, before, found.recurrence.get(layer))
            if memory is not None:
                after[layer] = memory
            if routing is not None:
                found.routing[layer] = routing
        return stream.summed(), after, found

    def sums(self, x: Float[Tensor, "B T D"], rows: Rows, objective: Objective) -> dict[str, Float[Tensor, ""]]:
        """The objective's terms, from the last layer's output."""
        return objective.sums(Hidden(self.final_norm(x), self.parts), self.head, rows)

    def _rotary(self, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if not self.attends:
            return None
        assert positions is not None
        return rotary_tables(
            positions,
            head_size=self.config.head_size,
            base=self.config.attention.rotary_base,
            dtype=torch.promote_types(dtype, torch.float32),
        )


def _length(state: Any) -> int:
    """Tokens in the caches of a state, padding included; 0 where it has none, or is no state of ours."""
    caches = getattr(state, "caches", None)
    return caches[0].key.shape[2] if caches else 0


def plain(fn, *args, **kwargs):
    return fn(*args, **kwargs)


def checkpointed(fn, *args, **kwargs):
    # There is no dropout: nothing random happens inside, so the RNG state need not be kept.
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
