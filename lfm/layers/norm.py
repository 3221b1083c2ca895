import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm.layers.parts import PLAIN, Parts


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in at least fp32.

    Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, hidden_size: int, *, eps: float, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.eps, self.parts = eps, parts
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x, self.weight.shape, self.parts.shared(self.weight), self.eps)
