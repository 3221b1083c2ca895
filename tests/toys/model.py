"""A toy family: each position sees a decayed sum of the embeddings before it, and pays for its activity."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.layers.cost import Cost, matrices
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, LanguageModel, Recompute
from lfm.models.losses import Losses, Objective, Term
from lfm.models.state import State


class ToyConfig(FamilyConfig):
    kind: Literal["toy"] = "toy"
    """Model family."""
    hidden_size: Width
    num_layers: Depth = 1
    seq_length: Tokens = 32
    vocab_size: Vocabulary = 320
    activity_coeff: float = 0.1

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("activity", "row", self.activity_coeff),)

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        return matrices(replicated=self.hidden_size**2)


@dataclass
class ToyState(State):
    total: Tensor


class Toy(LanguageModel):
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, D = config, config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.mix = nn.Linear(D, D, bias=False)
        self.head = Head(D, config.vocab_size, tied_to=self.embedding)

    def advance(self, ids: Tensor, state: Any = None, documents: Documents | None = None) -> tuple[Tensor, ToyState]:
        total = state.total if state is not None else self.empty_state(len(ids)).total
        x, hidden = self.embedding(ids), []
        for t in range(ids.shape[1]):
            if documents is not None:
                total = torch.where(documents.starts[:, t, None], 0.0, total)
            total = 0.5 * total + x[:, t]
            hidden.append(self.mix(total).tanh())
        return torch.stack(hidden, 1), ToyState(total)

    def empty_state(self, batch: int) -> ToyState:
        return ToyState(self.embedding.weight.new_zeros(batch, self.config.hidden_size))

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        hidden, _ = self.advance(rows.ids, documents=rows.documents)
        activity = hidden.square().mean((1, 2)).sum()
        yield Losses({**objective.sums(Hidden(hidden), self.head, rows), "activity": activity})

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        return torch.empty(*shape).normal_(0, self.config.hidden_size**-0.5, generator=generator_of(seed, name))
