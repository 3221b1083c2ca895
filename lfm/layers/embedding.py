"""The embedding of the plain parts."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.kernels.embedding import embedding


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, whose weight may add up its own gradient: `lfm.kernels.gradient_sum`."""

    def forward(self, input: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        return embedding(input, self.weight)
