"""Synapses with a Hebbian trace: what a trace is, and how it changes, is in `lfm/kernels/liquid_cell/`."""

import torch
import torch.nn.functional as F
from torch import nn

from lfm.kernels.liquid_cell import TraceMode, TraceRule

LARGEST_TRACE = 0.3
"""Norm of a trace over that of its weight."""


class PlasticSynapse(nn.Module):
    """Holder of the parameters of `(W + alpha * M) x + b`: M is the trace of what fired together in this sequence.

    Miconi et al. 2018, Differentiable plasticity (arXiv 1804.02464).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.alpha = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.log_eta = nn.Parameter(torch.empty(1))
        self.logit_decay = nn.Parameter(torch.empty(1))

    def rule(self, *, mode: TraceMode, differentiable: bool) -> TraceRule:
        weight, log_eta, logit_decay = (
            p.to(torch.promote_types(p.dtype, torch.float32)) for p in (self.weight, self.log_eta, self.logit_decay)
        )
        return TraceRule(
            alpha=self.alpha,
            eta=0.03 * F.softplus(log_eta),
            decay=logit_decay.sigmoid(),
            largest=LARGEST_TRACE * torch.linalg.vector_norm(weight),
            mode=mode,
            differentiable=differentiable,
        )
