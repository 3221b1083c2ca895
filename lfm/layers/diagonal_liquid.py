"""The diagonal liquid layer: a leaky unit a channel, each with a time constant that the token chooses."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from lfm.config import Config, Depth
from lfm.kernels.gated_scan import gated_scan
from lfm.layers.cost import Cost, matrices
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored

LONGEST_HALF_LIFE = 4096.0
"""Of a channel at initialisation, in tokens; the shortest is 1."""


class DiagonalConfig(Config):
    kind: Literal["diagonal"] = "diagonal"
    """A leaky unit a channel, whose time constant the token chooses."""
    interval: Depth = 4
    """Layers 0, interval, 2 * interval, ... carry them."""
    delta_min: float = Field(default=1e-5, ge=0)
    """Smallest decay rate: no channel's half-life exceeds ln 2 / delta_min tokens."""

    @model_validator(mode="after")
    def _check(self) -> "DiagonalConfig":
        check_delta_min(self.delta_min)
        return self

    def cost(self, hidden_size: int) -> Cost:
        return diagonal_cost(hidden_size)


def diagonal_cost(hidden_size: int) -> Cost:
    """Of a DiagonalLiquid; the recurrence's few operations a channel are not counted."""
    return matrices(sharded=4 * hidden_size * hidden_size) + Cost(sharded=hidden_size)


def check_delta_min(delta_min: float) -> None:
    """Raise ValueError where the slowest channel could not have the half-life that it starts with."""
    limit = math.log(2) / LONGEST_HALF_LIFE
    if delta_min >= limit:
        raise ValueError(
            f"delta_min={delta_min} allows no half-life of {LONGEST_HALF_LIFE:.0f} tokens, with which the "
            f"slowest channel starts; it must be below {limit:.3g}"
        )


class DiagonalLiquid(nn.Module):
    """`W_y (o * h)`, where every channel forgets at its own rate, and all comes from the same input z:

        v = tanh(W_v z)    delta = softplus(W_delta z + b_delta) + delta_min    o = sigmoid(W_o z)
        h_t = alpha_t h_{t-1} + (1 - alpha_t) v_t,    alpha = exp(-delta)

    Only W_delta has a bias.  Run-time storage is fused: `projections [3D, D]` holds W_v, W_delta and W_o.  Channels
    do not see each other: tensor-parallel processes have some each, of whole rows.
    """

    wide_parameters = ("delta_bias",)
    """In bf16 a bias near -9 would be off by up to 1/32, and with it the half-life by 3 %."""

    def __init__(self, hidden_size: int, *, delta_min: float, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.delta_min, self.width = delta_min, hidden_size // parts.tensor_size
        self.projections = parts.column_linear(hidden_size, 3 * hidden_size)
        self.delta_bias = nn.Parameter(torch.empty(self.width))
        self.output = parts.row_linear(hidden_size, hidden_size)

    def stored(self) -> dict[str, Stored]:
        D = self.width
        parts = {f"{n}.weight": (slice(i * D, (i + 1) * D),) for i, n in enumerate(("value", "delta", "gate"))}
        return {
            **{name: Stored("projections.weight", index, cut=0) for name, index in parts.items()},
            "delta.bias": Stored("delta_bias", cut=0),
            "output.weight": Stored("output.weight", cut=1),
        }

    def forward(
        self,
        z: Float[Tensor, "B T D"],
        *,
        state: Float[Tensor, "B D"] | None = None,
        starts: Bool[Tensor, "B whole_T"] | None = None,
        scale: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
        """`starts` marks the first token of each document; the state returned is at least fp32.  `scale` multiplies
        what comes out: on a GPU ahead of the last product, in a pass that is made anyway."""
        # A whole model may have been converted to bf16.
        bias = self.delta_bias.to(torch.promote_types(self.delta_bias.dtype, torch.float32))
        ahead, behind = (scale, 1.0) if z.is_cuda else (1.0, scale)
        y, final = gated_scan(self.projections(z), bias, state, starts, delta_min=self.delta_min, scale=ahead)
        y = self.output(y)
        return (y if behind == 1.0 else behind * y), final


def initial_delta_bias(num_channels: int, delta_min: float) -> Float[Tensor, " D"]:
    """`b_delta`, float64, with which half-lives ln 2 / delta at z = 0 are log-spaced from 1 to LONGEST_HALF_LIFE."""
    half_lives = torch.logspace(0, math.log2(LONGEST_HALF_LIFE), num_channels, base=2, dtype=torch.float64)
    softplus = math.log(2) / half_lives - delta_min
    return softplus + torch.log(-torch.expm1(-softplus))
