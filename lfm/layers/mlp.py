"""The gated feed-forward layer of the dense families."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lfm.config import Config, Width
from lfm.kernels.swiglu import swiglu
from lfm.layers.cost import Cost, matrices
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored


class SwiGLUConfig(Config):
    kind: Literal["swiglu"] = "swiglu"
    """One feed-forward network for every token."""
    ffn_hidden_size: Width

    def cost(self, hidden_size: int) -> Cost:
        return matrices(sharded=3 * hidden_size * self.ffn_hidden_size)


class SwiGLU(nn.Module):
    """`D(SiLU(G u) * (U u))`, no biases.  Shazeer 2020, arXiv 2002.05202.

    Run-time storage is fused: `gate_up [2F, D]`, gate first.
    """

    def __init__(self, hidden_size: int, config: SwiGLUConfig, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.width = config.ffn_hidden_size // parts.tensor_size
        self.gate_up = parts.column_linear(hidden_size, 2 * config.ffn_hidden_size)
        self.down = parts.row_linear(config.ffn_hidden_size, hidden_size)

    def stored(self) -> dict[str, Stored]:
        F_ = self.width
        return {
            "gate.weight": Stored("gate_up.weight", (slice(0, F_),), cut=0),
            "up.weight": Stored("gate_up.weight", (slice(F_, 2 * F_),), cut=0),
            "down.weight": Stored("down.weight", cut=1),
        }

    def forward(self, u: Float[Tensor, "B T D"], *, scale: float = 1.0) -> Float[Tensor, "B T D"]:
        """`scale` multiplies what comes out: on a GPU ahead of the last product, in a pass that is made anyway."""
        ahead, behind = (scale, 1.0) if u.is_cuda else (1.0, scale)
        y = self.down(swiglu(self.gate_up(u), scale=ahead))
        return y if behind == 1.0 else behind * y
