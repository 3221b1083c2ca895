"""The liquid layer: sparse nonlinear leaky reservoirs between two projections."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from lfm.config import Config, Depth, Tokens, Width
from lfm.kernels.reservoir import WARMUP_NOTCHES, RecurrenceStats, reservoir_recurrence
from lfm.layers.cost import Cost, frozen_matrices, matrices
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored


class ReservoirConfig(Config):
    kind: Literal["reservoir"] = "reservoir"
    """Sparse nonlinear reservoirs between two projections."""
    interval: Depth = 4
    """Layers 0, interval, 2 * interval, ... carry reservoirs."""
    num_reservoirs: Width = 3
    reservoir_size: Width = 512
    """Units of one reservoir."""
    leak_rate: float = Field(default=0.3, gt=0, le=1)
    spectral_radius: float = Field(default=0.99, gt=0)
    """Largest eigenvalue modulus of each recurrent matrix at initialisation."""
    input_scaling: float = Field(default=1.0, gt=0)
    """Factor on the drive, with norm: pre only; 1.0 gives it an RMS of about 1 at initialisation."""
    connectivity: float = Field(default=0.1, gt=0, le=1)
    """Share of non-zero recurrent weights."""
    norm: Literal["pre", "post"] = "pre"
    """pre: x + W_out h(norm(x)); post: norm(x + W_out h(x)), which renormalises the residual stream."""
    train_reservoir: bool = False
    """Train the non-zero recurrent weights; zeros stay zero.  Every 100 updates, what forgets too slowly for the
    longest warm-up is scaled down."""
    backend: Literal["auto", "sequential", "chunked"] = "auto"
    """Of training; evaluation and generation are sequential, which is exact.  auto: chunked with warm-up where that is
    shorter than the sequence, else sequential."""
    chunk_length: Tokens | Literal["fill"] = 128
    """Steps of one chunk; fixed, so that results do not depend on the batch size.  fill: the length with
    which the device holds all chunks of a batch at once: faster, but then the last bits of results follow its size."""
    warmup: Literal[32, 64, 96, 128, 192, 256, 384] = 64
    """Steps a chunk starts early, at the first training step; the residual guard moves it up and down from there."""
    tolerance: float = Field(default=1e-2, gt=0)
    """Largest relative chunk-boundary residual before repair passes, then the sequential path, take over: by so much
    the states of a training row, and through them its documents and the rows beside it, may move each other."""

    @model_validator(mode="after")
    def _check(self) -> "ReservoirConfig":
        if self.norm == "post" and self.input_scaling != 1.0:
            raise ValueError(f"input_scaling={self.input_scaling} needs norm: pre; post has none")
        return self

    def cost(self, hidden_size: int) -> Cost:
        """Reservoirs count as the dense matrices that they are stored as."""
        width = self.num_reservoirs * self.reservoir_size
        recurrent = width * self.reservoir_size
        reservoirs = matrices(replicated=recurrent) if self.train_reservoir else frozen_matrices(recurrent)
        return matrices(sharded=2 * width * hidden_size) + Cost(sharded=width, replicated=hidden_size) + reservoirs

    def must_forget(self, num_positions: int) -> bool:
        """Whether trained reservoirs must be kept forgetful, because so many positions may be cut into chunks."""
        length = 128 if self.chunk_length == "fill" else self.chunk_length
        may_cut = self.backend == "chunked" or num_positions > length + WARMUP_NOTCHES[0]
        return self.train_reservoir and self.backend != "sequential" and may_cut


class Liquid(nn.Module):
    """`W_out h + b_out` with `h_t = (1-a) h_{t-1} + a tanh(R h_{t-1} + s_in (W_in u_t + b_in))` per reservoir.

    Jaeger et al. 2007 (leaky-integrator echo state networks).  The recurrent matrices are stored dense in
    `reservoirs [R, N, N]`: a frozen buffer in at least fp32, or a parameter, whose zeros `connections` keeps.  With
    norm: post there is no s_in.
    """

    reservoirs: Tensor
    connections: Tensor

    def __init__(self, hidden_size: int, config: ReservoirConfig, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        R, N = config.num_reservoirs, config.reservoir_size
        self.warmup: int = config.warmup
        self.input = parts.column_linear(hidden_size, R * N, bias=True)
        self.output = parts.row_linear(R * N, hidden_size, bias=True)
        if config.train_reservoir:
            self.reservoirs = nn.Parameter(torch.empty(R, N, N))
            self.register_buffer("connections", torch.empty(R, N, N, dtype=torch.bool))
        else:
            self.register_buffer("reservoirs", torch.empty(R, N, N))

    def stored(self) -> dict[str, Stored]:
        tensors = {"weight": "reservoirs", **({"connections": "connections"} if self.config.train_reservoir else {})}
        R = range(self.config.num_reservoirs)
        return {
            "input.weight": Stored("input.weight", cut=0),
            "input.bias": Stored("input.bias", cut=0),
            "output.weight": Stored("output.weight", cut=1),
            "output.bias": Stored("output.bias"),
            **{f"reservoirs.{j}.{suffix}": Stored(name, (j,)) for suffix, name in tensors.items() for j in R},
        }

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        *,
        state: Float[Tensor, "B R N"] | None = None,
        starts: Bool[Tensor, "B whole_T"] | None = None,
        stats: RecurrenceStats | None = None,
        exact: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B R N"]]:
        """`starts` marks the first token of each document; `stats` receives residual, saturation and repairs.

        With `exact`, and in eval mode, every position is stepped through, whatever the backend.  Chunks are a device
        of training: their states are off by up to `tolerance`, and one guard judges all sequences of a call together.
        """
        c = self.config
        # The recurrence runs whole on every tensor-parallel process: three reservoirs do not divide, and its time is
        # that of its steps, not of its units.
        drive = self.parts.gather_units(self.input(u))
        if c.norm == "pre" and c.input_scaling != 1.0:
            drive = drive * c.input_scaling
        weight = self.reservoirs * self.connections if c.train_reservoir else self.reservoirs
        states, final = reservoir_recurrence(
            drive.unflatten(-1, (c.num_reservoirs, c.reservoir_size)),
            weight,
            state,
            starts,
            leak_rate=c.leak_rate,
            backend="sequential" if exact or not self.training else c.backend,
            chunk_length=c.chunk_length,
            warmup=self.warmup,
            tolerance=c.tolerance,
            stats=stats,
        )
        return self.output(self.parts.own_units(states.flatten(-2))), final
