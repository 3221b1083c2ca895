"""LiquidLM: frozen random features of the current token and the clock, in front of a stack of LSTMs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.backend import widest
from lfm.layers.cost import Cost, frozen_matrices
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.lstm import StackedLSTM, lstm_cost
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, LanguageModel, Recompute
from lfm.models.losses import Losses, Objective
from lfm.models.state import State


class LiquidLMConfig(FamilyConfig):
    kind: Literal["liquidlm"] = "liquidlm"
    """Model family."""
    hidden_size: Width = 1024
    """Width of the embedding and of every LSTM layer."""
    num_layers: Depth = 4
    """LSTM layers."""
    reservoir_size: Width = 4096
    """Random features of a token, which the first LSTM layer reads."""
    connectivity: float = Field(default=0.05, gt=0, le=1)
    """Probability that a feature reads a dimension of the embedding."""
    reservoir_std: PositiveFloat = 0.1
    """Standard deviation of the reservoir's weights where it has a connection."""
    phase_std: NonNegativeFloat = 0.01
    """Standard deviation of the features' angular frequencies, radians a token; 0 takes the clock away."""
    hidden_dropout: float = Field(default=0.4, ge=0, lt=1)
    """On the features, between LSTM layers and before the head, while training."""
    layernorm_epsilon: PositiveFloat = 1e-5
    seq_length: Tokens = 512
    """Length of a training row in tokens; the state has no limit."""
    vocab_size: Vocabulary = 50_265

    @property
    def is_tied(self) -> bool:
        return False

    @property
    def stored_connections(self) -> int:
        """Connections stored per feature: six standard deviations above the mean of their random number, in eights."""
        mean = self.connectivity * self.hidden_size
        enough = mean + 6 * math.sqrt(mean * (1 - self.connectivity))
        return min(self.hidden_size, 8 * math.ceil(enough / 8))

    @property
    def norm_parameters(self) -> int:
        return 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * (self.hidden_size + 1)

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        """The first layer's has the reservoir in it: the dense matrix that it stands for, and the phases."""
        D, R = self.hidden_size, self.reservoir_size
        if layer > 0:
            return lstm_cost(D, D)
        return lstm_cost(R, D) + frozen_matrices(R * D) + Cost(frozen=R)


@dataclass
class LiquidLMState(State):
    """What streaming carries: 2 x num_layers x hidden_size numbers and a clock, whatever the length of the prefix."""

    h: Float[Tensor, "B L D"]
    c: Float[Tensor, "B L D"]
    """Cell states, like `h` in at least fp32."""
    position: Int[Tensor, " B"]
    """Of the next token."""


class PhaseReservoir(nn.Module):
    """`q_t = tanh(R x_t + sin(phi t) + cos(phi t))` with frozen sparse R `[R, D]` and frozen frequencies phi `[R]`.

    It has no memory: a feature depends on one token and its position.  R is stored by rows, `values` at `columns`,
    as many of each for every row; the columns of a row are distinct, and those beyond its connections have value 0.
    """

    values: Float[Tensor, "R K"]
    columns: Int[Tensor, "R K"]
    phases: Float[Tensor, " R"]

    def __init__(self, config: LiquidLMConfig) -> None:
        super().__init__()
        shape = (config.reservoir_size, config.stored_connections)
        self.hidden_size = config.hidden_size
        self.register_buffer("values", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("columns", torch.empty(shape, dtype=torch.int32))
        self.register_buffer("phases", torch.empty(shape[0], dtype=torch.float32))

    def forward(self, x: Float[Tensor, "B T D"], phase: Float[Tensor, "b T R"]) -> Float[Tensor, "B T R"]:
        """`phase` is `self.phase(positions)`; `b` is B, or 1 for positions that all rows share."""
        return torch.tanh((x @ self.dense(x.dtype).T).to(phase.dtype) + phase).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "R D"]:
        """R as a matrix, made for one call: a dense product is faster than a sparse one from a few tokens on."""
        zeros = torch.zeros(len(self.values), self.hidden_size, dtype=dtype, device=self.values.device)
        return zeros.scatter_(1, self.columns.long(), self.values.to(dtype))

    def phase(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape R"]:
        """`sin(phi t) + cos(phi t)`, in the dtype of `phases`.

        An angle of many turns has too few digits left in fp32.  In fp64 the product of an fp32 frequency and a
        position is exact.
        """
        wide = widest(positions.device)
        angle = self.phases.to(wide) * positions[..., None].to(wide)
        return (angle.sin() + angle.cos()).to(self.phases.dtype)


class LiquidLM(LanguageModel):
    """Embedding, reservoir, LSTMs, LayerNorm, and a head of its own with a bias."""

    config: LiquidLMConfig

    def __init__(self, config: LiquidLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.reservoir = PhaseReservoir(config)
        self.lstm = StackedLSTM(
            config.reservoir_size, config.hidden_size, num_layers=config.num_layers, dropout=config.hidden_dropout
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.head = Head(config.hidden_size, config.vocab_size, bias=True)

    def advance(
        self, ids: Int[Tensor, "B T"], state: State | None = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], LiquidLMState]:
        B, T = ids.shape
        if state is not None:
            state.check_like(self.empty_state(B))
            assert isinstance(state, LiquidLMState)
            positions = state.position[:, None] + torch.arange(T, device=ids.device)
            phase = self.reservoir.phase(positions)
        elif documents is None or documents.row_is_one_document:
            positions = torch.arange(T, device=ids.device).expand(B, T)
            phase = self.reservoir.phase(positions[:1])
        else:
            positions = documents.positions
            phase = self.reservoir.phase(torch.arange(documents.longest, device=ids.device))[positions]
        dropout = self.config.hidden_dropout
        q = F.dropout(self.reservoir(self.embedding(ids), phase), dropout, self.training)
        o, (h, c) = self.lstm(q, state=(state.h, state.c) if state else None, documents=documents)
        y = F.dropout(self.final_norm(o), dropout, self.training)
        return y, LiquidLMState(h, c, positions[:, -1] + 1)

    def empty_state(self, batch: int) -> LiquidLMState:
        weight = self.embedding.weight
        zeros = torch.zeros(
            batch,
            self.config.num_layers,
            self.config.hidden_size,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        return LiquidLMState(zeros, zeros, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        hidden, _ = self.advance(rows.ids, documents=rows.documents)
        yield Losses(objective.sums(Hidden(hidden), self.head, rows))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """
        | tensor | distribution |
        | --- | --- |
        | embedding | N(0, 1) |
        | reservoir | each entry kept with probability connectivity, N(0, reservoir_std) |
        | phases | N(0, phase_std) |
        | LSTM weights and biases, head's weight and bias | U(+-1 / sqrt(hidden_size)) |
        | norm gain; bias | 1; 0 |
        """
        if name == "final_norm.weight":
            return torch.ones(*shape)
        if name == "final_norm.bias":
            return torch.zeros(*shape)
        if name in ("reservoir.values", "reservoir.columns"):
            return draw_reservoir(self.config, seed)[name == "reservoir.columns"]
        generator = generator_of(seed, name)
        if name == "embedding.weight":
            return torch.empty(*shape).normal_(0, 1, generator=generator)
        if name == "reservoir.phases":
            return torch.empty(*shape).normal_(0, self.config.phase_std, generator=generator)
        bound = self.config.hidden_size**-0.5
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def draw_reservoir(config: LiquidLMConfig, seed: int) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """Values and columns of one draw.  Raises ValueError in the rare case of a row with too many connections."""
    generator = generator_of(seed, "reservoir")
    shape = (config.reservoir_size, config.hidden_size)
    weight = torch.empty(shape).normal_(0, config.reservoir_std, generator=generator)
    kept = torch.empty(shape).uniform_(generator=generator) < config.connectivity
    most, stored = int(kept.sum(1).max()), config.stored_connections
    if most > stored:
        raise ValueError(f"seed={seed} gives a reservoir row {most} connections and {stored} are stored; change seed")
    # The row's own columns first, then others: distinct ones, so that writing their zeros overwrites nothing.
    columns = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :stored]
    return (weight * kept).gather(1, columns), columns.int()
