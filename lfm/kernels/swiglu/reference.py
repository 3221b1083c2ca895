"""The definition of SwiGLU's activation, in plain PyTorch.  Shazeer 2020, arXiv 2002.05202."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
