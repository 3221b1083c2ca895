import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.kernels.layer_norm import layer_norm
from lfm.kernels.rms_norm import add_rms_norm
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in at least fp32.

    Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, hidden_size: int, *, eps: float, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.eps, self.parts = eps, parts
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def stored(self) -> dict[str, Stored]:
        return {"weight": Stored("weight")}

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.add_norm(x, None)[1]

    def add_norm(
        self, x: Float[Tensor, "... D"], y: Float[Tensor, "... D"] | None
    ) -> tuple[Float[Tensor, "... D"], Float[Tensor, "... D"]]:
        """`x + y`, or x where there is no y, and the same normalized."""
        return add_rms_norm(x, y, self.parts.shared(self.weight), eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, with gain and bias; statistics in at least fp32.  Ba et al. 2016, arXiv 1607.06450."""

    def forward(self, input: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return layer_norm(input, self.weight, self.bias, eps=self.eps)
