"""The gated feed-forward layer of the dense families."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lfm.config import Config, Width
from lfm.kernels.swiglu import swiglu


class SwiGLUConfig(Config):
    kind: Literal["swiglu"] = "swiglu"
    """One feed-forward network for every token."""
    ffn_hidden_size: Width


class SwiGLU(nn.Module):
    """`D(SiLU(G u) * (U u))`, no biases.  Shazeer 2020, arXiv 2002.05202.

    Run-time storage is fused: `gate_up [2F, D]`, gate first.
    """

    def __init__(self, hidden_size: int, config: SwiGLUConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, hidden_size, bias=False)

    def fused_parameters(self) -> dict[str, tuple[str, tuple[slice, ...]]]:
        """Global name -> (run-time parameter, index of its part)."""
        F_ = self.down.in_features
        return {
            "gate.weight": ("gate_up.weight", (slice(0, F_),)),
            "up.weight": ("gate_up.weight", (slice(F_, 2 * F_),)),
        }

    def forward(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down(swiglu(self.gate_up(u)))
