"""AdamW with its parameter groups, and the moments laid out for checkpoints."""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from lfm.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment's running means."""
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on gains and biases."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""


def adamw(config: OptimizerConfig, parameters: Iterable[tuple[str, Tensor]]) -> torch.optim.AdamW:
    """Fused AdamW over (name, master) pairs, with its moments made at once, so that a fresh run can be loaded into.

    Matrices decay; vectors (gains and biases) do not.  Loshchilov & Hutter 2019, arXiv 1711.05101.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for _, p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer
