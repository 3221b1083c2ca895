"""LAERC: layers of a frozen random recurrent network, gated against the direct path, and a feed-forward network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.gating import gated, joined_norm, scaled_sum
from lfm.kernels.reservoir import RecurrenceStats, reservoir_recurrence
from lfm.layers.cost import Cost, frozen_matrices, matrices
from lfm.layers.linear import Linear
from lfm.layers.norm import LayerNorm
from lfm.layers.residual import ResidualStream
from lfm.layers.stored import Stored
from lfm.models.decoder import Block, Context, Decoder, Memory
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig
from lfm.models.losses import Measured, reservoir_measured
from lfm.models.state import State


class LAERCConfig(FamilyConfig):
    changeable: ClassVar[frozenset[str]] = frozenset({"seq_length", "chunk_length", "warmup", "tolerance", "exchange"})
    kind: Literal["laerc"] = "laerc"
    """Model family."""
    hidden_size: Width = 512
    num_layers: Depth = 16
    seq_length: Tokens = 1024
    """Tokens of a training row.  Nothing in the model depends on it: text may go on for ever."""
    vocab_size: Vocabulary = 50_257
    reservoir_multiple: float = Field(default=4.0, gt=0, le=1 << 20)
    """Units of a reservoir over hidden_size, rounded down."""
    reservoir_mlp_multiple: float = Field(default=1.0, gt=0, le=1 << 20)
    """Width of the reservoir's read-out over hidden_size, rounded down."""
    ffn_multiple: float = Field(default=4.0, gt=0, le=1 << 20)
    """Width of the feed-forward network over hidden_size, rounded down."""
    use_reservoir: bool = True
    """false: blocks of gate and feed-forward network alone, with which nothing mixes tokens."""
    keep_input_norm: bool = False
    """Fidelity, with use_reservoir: false only: keep the reservoir's input norm, which is then trained by nothing."""
    spectral_norm: float = Field(default=0.9, gt=0)
    """What reservoir_scaling says of each recurrent matrix."""
    reservoir_scaling: Literal["norm", "radius"] = "norm"
    """norm: spectral_norm is the largest singular value, and the radius about half of it; radius: it is the largest
    eigenvalue modulus.
    """
    backend: Literal["auto", "sequential", "chunked"] = "sequential"
    """Of training; evaluation and generation are sequential, which is exact.  chunked cuts time, to `tolerance`; auto:
    chunked where that is shorter than the sequence."""
    chunk_length: Tokens = 128
    """Steps of one chunk; fixed, so that results do not depend on the batch size."""
    warmup: Literal[32, 64, 96, 128, 192, 256, 384] = 64
    """Steps a chunk starts early, at the first training step; the residual guard moves it up and down from there."""
    tolerance: float = Field(default=1e-2, gt=0)
    """Largest relative chunk-boundary residual before repair passes, then the sequential path, take over."""
    exchange: Literal["float32", "working"] = "float32"
    """In what training multiplies states and W: float32, at least; working, the dtype of the weights, as liquid layers
    of lfm do.  Carried states, and all of evaluation and generation, are in at least float32."""
    gate_bias_init: float = 0.0
    """Of the gate's logits.  0 (published) halves the direct path in every block; -4 keeps 98 % of it."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    init_method_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "LAERCConfig":
        widths = {
            "reservoir_multiple": self.reservoir_size,
            "reservoir_mlp_multiple": self.reservoir_mlp_hidden_size,
            "ffn_multiple": self.ffn_hidden_size,
        }
        for key, width in widths.items():
            if width < 1:
                raise ValueError(
                    f"{key}={getattr(self, key)} of hidden_size={self.hidden_size} is no unit; "
                    f"the nearest that is one is {1 / self.hidden_size}"
                )
            if width > 1 << 20:
                raise ValueError(
                    f"{key}={getattr(self, key)} of hidden_size={self.hidden_size} is {width} units; "
                    f"the most are {1 << 20}"
                )
        if self.keep_input_norm and self.use_reservoir:
            raise ValueError("keep_input_norm=true needs use_reservoir=false; a reservoir always has the norm")
        return self

    @property
    def lays_out(self) -> frozenset[str]:
        return frozenset({"data", "pipeline"})

    @property
    def reservoir_size(self) -> int:
        """Units of one reservoir."""
        return int(self.hidden_size * self.reservoir_multiple)

    @property
    def reservoir_mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.reservoir_mlp_multiple)

    @property
    def ffn_hidden_size(self) -> int:
        return int(self.hidden_size * self.ffn_multiple)

    @property
    def reservoir_layers(self) -> tuple[int, ...]:
        cut = self.use_reservoir and self.backend != "sequential"
        return tuple(range(self.num_layers)) if cut else ()

    @property
    def reservoir_warmup(self) -> int:
        return self.warmup if self.reservoir_layers else 0

    @property
    def measured(self) -> tuple[Measured, ...]:
        return reservoir_measured(self.reservoir_layers)

    @property
    def run_name(self) -> str:
        R, H, F = map(_shortest, (self.reservoir_multiple, self.reservoir_mlp_multiple, self.ffn_multiple))
        sizes = f"v{self.vocab_size}_seq{self.seq_length}_d{self.hidden_size}_L{self.num_layers}"
        return f"laerc_{sizes}_R{R}_RMLP{H}_FF{F}"

    @property
    def norm_parameters(self) -> int:
        return 2 * self.hidden_size

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        D, R, H = self.hidden_size, self.reservoir_size, self.reservoir_mlp_hidden_size
        # Biases, gains and the scalar of gate and feed-forward network.
        cost = matrices(replicated=3 * D * D + 2 * D * self.ffn_hidden_size)
        cost += Cost(replicated=6 * D + 2 * D + self.ffn_hidden_size + D + 1)
        if self.use_reservoir or self.keep_input_norm:
            cost += Cost(replicated=2 * D)
        if self.use_reservoir:
            cost += frozen_matrices(R * R + R * D) + matrices(replicated=R * H + H * D)
            cost += Cost(replicated=2 * R + H + D + 1, frozen=2 * R)
        return cost


def _shortest(x: float) -> str:
    """4 for 4.0, 0.5 for 0.5."""
    return repr(x).removesuffix(".0")


@dataclass
class LAERCState(State):
    """What streaming carries: the reservoir `[B, R]` of each layer, at least fp32; nothing without reservoirs."""

    reservoirs: list[Tensor]


class Reservoir(nn.Module):
    """`r_t = tanh(U h_t + b_u + W r_{t-1} + b_w)`, all of it frozen, and in at least fp32 but for `exchange`."""

    input_weight: Tensor
    input_bias: Tensor
    recurrent_weight: Tensor
    recurrent_bias: Tensor

    def __init__(self, config: LAERCConfig) -> None:
        super().__init__()
        self.config = config
        self.warmup: int = config.warmup
        D, R = config.hidden_size, config.reservoir_size
        self.register_buffer("input_weight", torch.empty(R, D))
        self.register_buffer("input_bias", torch.empty(R))
        self.register_buffer("recurrent_weight", torch.empty(R, R))
        self.register_buffer("recurrent_bias", torch.empty(R))

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        *,
        state: Float[Tensor, "B R"] | None,
        starts: Bool[Tensor, "B T"] | None,
        stats: RecurrenceStats | None,
        exact: bool,
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B R"]]:
        """States in `h`'s dtype, and the last one.  `starts` marks the first token of each document.

        With `exact`, and in eval mode, every position is stepped through, whatever the backend.
        """
        c = self.config
        exact = exact or not self.training
        dtype = h.dtype if c.exchange == "working" and not exact else self.input_weight.dtype
        bias = self.input_bias + self.recurrent_bias
        drive = F.linear(h.to(dtype), self.input_weight.to(dtype), bias.to(dtype))
        states, final = reservoir_recurrence(
            drive.unsqueeze(2),
            self.recurrent_weight.unsqueeze(0),
            None if state is None else state.unsqueeze(1),
            starts,
            leak_rate=1.0,
            backend="sequential" if exact else c.backend,
            chunk_length=c.chunk_length,
            warmup=self.warmup,
            tolerance=c.tolerance,
            stats=stats,
        )
        return states.squeeze(2).to(h.dtype), final.squeeze(1)


class MLP(nn.Module):
    """`down GELU(up x)`, both with bias."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.up = Linear(input_size, hidden_size)
        self.down = Linear(hidden_size, output_size)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return self.down(F.gelu(self.up(x)))


class LAERCBlock(Block):
    """`m = g rho + (1 - g) x`, then `m + a FFN(norm(m))`; there is no other residual connection.

    `rho = exp(s) MLP(norm(r))` is read out of the reservoir, which sees norm(x); the gate g sees the raw input, as
    norm([x; rho]).  Without a reservoir rho is 0.
    """

    def __init__(self, config: LAERCConfig) -> None:
        super().__init__()
        D, R, epsilon = config.hidden_size, config.reservoir_size, config.layernorm_epsilon
        self.use_reservoir = config.use_reservoir
        if config.use_reservoir or config.keep_input_norm:
            self.input_norm = LayerNorm(D, eps=epsilon)
        if config.use_reservoir:
            self.reservoir = Reservoir(config)
            self.readout_norm = LayerNorm(R, eps=epsilon)
            self.readout = MLP(R, config.reservoir_mlp_hidden_size, D)
            self.readout_log_scale = nn.Parameter(torch.empty(1))
        self.gate_norm = LayerNorm(2 * D, eps=epsilon)
        self.gate = MLP(2 * D, D, D)
        self.ffn_norm = LayerNorm(D, eps=epsilon)
        self.ffn = MLP(D, config.ffn_hidden_size, D)
        self.ffn_scale = nn.Parameter(torch.empty(1))

    def stored(self) -> dict[str, Stored]:
        # Scalars, which DeepSpeed does not broadcast: at run time they are vectors.
        names = ("readout_log_scale", "ffn_scale") if self.use_reservoir else ("ffn_scale",)
        return {name: Stored(name, (0,)) for name in names}

    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, None]:
        x, final = stream.summed(), None
        if self.use_reservoir:
            documents = context.documents
            # A document that begins with its row begins from zero anyway.
            starts = None if documents is None or documents.row_is_one_document else context.starts
            states, final = self.reservoir(
                self.input_norm(x), state=memory, starts=starts, stats=stats, exact=context.streaming
            )
            norm = self.gate_norm
            x, rho, z = joined_norm(
                x, self.readout(self.readout_norm(states)), self.readout_log_scale, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            rho = torch.zeros_like(x)
            z = self.gate_norm(torch.cat((x, rho), -1))
        m = gated(self.gate(z), rho, x)
        return ResidualStream(scaled_sum(m, self.ffn(self.ffn_norm(m)), self.ffn_scale)), final, None


class LAERC(Decoder):
    """Blocks between a tied embedding and a final norm; no positions, no dropout."""

    config: LAERCConfig

    @property
    def liquids(self) -> dict[int, Reservoir]:
        here = {int(name): cast(LAERCBlock, block) for name, block in self.layers.items()}
        return {layer: block.reservoir for layer, block in here.items() if layer in self.config.reservoir_layers}

    def make_block(self, layer: int) -> LAERCBlock:
        return LAERCBlock(self.config)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, eps=self.config.layernorm_epsilon)

    def empty_state(self, batch: int) -> LAERCState:
        return self.blank_state(batch, 0).map(
            lambda blank: torch.zeros_like(blank, device=self.embedding.weight.device)
        )

    def blank_state(self, batch: int, length: int) -> LAERCState:
        c, dtype = self.config, torch.promote_types(self.embedding.weight.dtype, torch.float32)
        blank = torch.empty(batch, c.reservoir_size, dtype=dtype, device="meta")
        return LAERCState([blank] * (c.num_layers if c.use_reservoir else 0))

    def memories(self, state: LAERCState) -> dict[int, Memory]:
        return dict(enumerate(state.reservoirs))

    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> LAERCState:
        return LAERCState(list(memories.values()))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """
        | tensor | distribution |
        | --- | --- |
        | gains | 1 |
        | biases | 0; of the gate's logits gate_bias_init |
        | readout_log_scale, ffn_scale | 0: a feed-forward network begins as a no-op |
        | reservoir: recurrent weight | N(0, 1 / sqrt(R)), scaled to spectral_norm |
        | reservoir: input weight | N(0, 1 / sqrt(hidden_size)) |
        | every other matrix, embedding | N(0, init_method_std) |
        """
        c = self.config
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        if name.endswith("gate.down.bias"):
            return torch.full(tuple(shape), c.gate_bias_init)
        if name.endswith(("bias", "scale")):
            return torch.zeros(tuple(shape))
        generator = generator_of(seed, name)
        if name.endswith("reservoir.recurrent_weight"):
            weight = torch.randn(*shape, generator=generator, dtype=torch.float64) * c.reservoir_size**-0.5
            return (weight * (c.spectral_norm / _size(weight, c.reservoir_scaling))).float()
        std = c.hidden_size**-0.5 if name.endswith("reservoir.input_weight") else c.init_method_std
        return torch.empty(*shape).normal_(0, std, generator=generator)


def _size(weight: Float[Tensor, "R R"], scaling: Literal["norm", "radius"]) -> Float[Tensor, ""]:
    """Largest singular value, or largest eigenvalue modulus.

    Exact, by a whole decomposition: the largest values of a random matrix crowd together, so that power iterations are
    slow to tell them apart.
    """
    if scaling == "norm":
        return torch.linalg.eigvalsh(weight.T @ weight)[-1].sqrt()
    return torch.linalg.eigvals(weight).abs().max()
