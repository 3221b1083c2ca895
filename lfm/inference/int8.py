"""Products of integers for a model that only reads, on a CPU: weights of 8 bits by output, activations by token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.errors import UserError
from lfm.layers.attention import Attention
from lfm.layers.diagonal_liquid import DiagonalLiquid
from lfm.layers.mlp import SwiGLU
from lfm.models.language_model import LanguageModel

LAYERS = (Attention, DiagonalLiquid, SwiGLU)
"""Whose linears become integers: they are applied as they are, and hold no state."""

LARGEST = 127
"""Of a weight or an activation; -128 is left out, so that both signs are alike."""


class Int8Linear(nn.Module):
    """`y = s_x s_w (q_x q_w^T)`, with q = round(x / s), s = max |x| / 127 of a token's or an output's own numbers.

    The product is of int8 summed in int32, and so is exact: a token's result does not depend on those beside it.  No
    gradient.  Dettmers et al. 2022 (arXiv 2208.07339), section 2.1: vector-wise quantization.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None and linear.in_features < 2**31 // LARGEST**2
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])

    def forward(self, x: Float[Tensor, "*shape in_features"]) -> Float[Tensor, "*shape out_features"]:
        q, scale = rounded(x.flatten(0, -2))
        y = torch.ops.aten._int_mm(q, self.weight.t()) * scale * self.scale
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[n, m]` and fp32 scales `[n, 1]` of rows `[n, m]`."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST  # a row of zeros has some scale too
    return (x / scale).round().to(torch.int8), scale


def use_int8(model: LanguageModel) -> None:
    """Replace the linears of `LAYERS`, in place; embedding, head, experts, reservoirs and norms stay as they are.

    Raises UserError for a model without such layers, or one that is not on a CPU.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise UserError(f"--int8 computes on a CPU and the model is on {device.type}; add --device cpu")
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    if not layers:
        raise UserError(
            f"--int8 is for attention, diagonal liquid and SwiGLU layers, and this model of kind {model.config.kind} "
            "has none; leave it out"
        )
    for layer in layers:
        for name, linear in list(layer.named_children()):
            assert isinstance(linear, nn.Linear), name
            setattr(layer, name, Int8Linear(linear))
