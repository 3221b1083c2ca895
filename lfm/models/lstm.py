"""LSTM: a stack of LSTMs and nothing else, the control that recurrent families are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.layers.cost import Cost
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.lstm import StackedLSTM, lstm_cost
from lfm.layers.norm import RMSNorm
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, LanguageModel, Recompute
from lfm.models.losses import Losses, Objective
from lfm.models.state import State


class LSTMConfig(FamilyConfig):
    kind: Literal["lstm"] = "lstm"
    """Model family."""
    hidden_size: Width
    """Width of the embedding and of every layer."""
    num_layers: Depth
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """On every layer's output, while training."""
    layernorm_epsilon: PositiveFloat = 1e-5
    seq_length: Tokens = 1024
    """Length of a training row in tokens; the state has no limit."""
    vocab_size: Vocabulary = 50_257

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        return lstm_cost(self.hidden_size, self.hidden_size)


@dataclass
class LSTMState(State):
    """What streaming carries: 2 x num_layers x hidden_size numbers, in at least fp32."""

    h: Float[Tensor, "B L D"]
    c: Float[Tensor, "B L D"]


class LSTM(LanguageModel):
    """Embedding, LSTMs, RMSNorm; the head is the embedding."""

    config: LSTMConfig

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.lstm = StackedLSTM(D, D, num_layers=config.num_layers, dropout=config.hidden_dropout)
        self.final_norm = RMSNorm(D, eps=config.layernorm_epsilon)
        self.head = Head(D, config.vocab_size, tied_to=self.embedding)

    def advance(
        self, ids: Int[Tensor, "B T"], state: State | None = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], LSTMState]:
        if state is not None:
            state.check_like(self.empty_state(len(ids)))
            assert isinstance(state, LSTMState)
        o, (h, c) = self.lstm(self.embedding(ids), state=(state.h, state.c) if state else None, documents=documents)
        return self.final_norm(F.dropout(o, self.config.hidden_dropout, self.training)), LSTMState(h, c)

    def empty_state(self, batch: int) -> LSTMState:
        weight = self.embedding.weight
        zeros = torch.zeros(
            batch,
            self.config.num_layers,
            self.config.hidden_size,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        return LSTMState(zeros, zeros)

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        hidden, _ = self.advance(rows.ids, documents=rows.documents)
        yield Losses(objective.sums(Hidden(hidden), self.head, rows))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """
        | tensor | distribution |
        | --- | --- |
        | embedding | N(0, 1 / sqrt(hidden_size)): logits of variance 1 |
        | LSTM weights and biases | U(+-1 / sqrt(hidden_size)) |
        | norm gain | 1 |
        """
        if name == "final_norm.weight":
            return torch.ones(*shape)
        scale, generator = self.config.hidden_size**-0.5, generator_of(seed, name)
        if name == "embedding.weight":
            return torch.empty(*shape).normal_(0, scale, generator=generator)
        return torch.empty(*shape).uniform_(-scale, scale, generator=generator)
