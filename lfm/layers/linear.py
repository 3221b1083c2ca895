"""The linear layer of the plain parts."""

from jaxtyping import Float
from torch import Tensor, nn

from lfm.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose weight may add up its own gradient: `lfm.kernels.gradient_sum`."""

    def forward(self, input: Float[Tensor, "... K"]) -> Float[Tensor, "... N"]:
        return linear(input, self.weight, self.bias)
