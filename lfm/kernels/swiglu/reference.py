"""The definition of SwiGLU's activation, in plain PyTorch.  Shazeer 2020, arXiv 2002.05202."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor, scale: float = 1.0) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    y = F.silu(gate) * up
    return y if scale == 1.0 else scale * y
