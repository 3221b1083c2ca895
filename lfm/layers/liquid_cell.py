"""The liquid cell: neurons with time constants of their own, on synapses that change while they read."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lfm.kernels.liquid_cell import CellWeights, Integration, Norm, Synapses, TraceMode, Traces, liquid_cell
from lfm.layers.plastic_synapse import PlasticSynapse


class LiquidCell(nn.Module):
    """One token of `dh/dt = (z(h) - h) / tau(h)`, and of the traces of the synapses that make z.

        z(h)   = tanh((W_ih + alpha_ih * M_ih) x + b_ih + (W_hh + alpha_hh * M_hh) h + b_hh)
        tau(h) = softplus(T2 silu(T1 [x; h] + t1) + t2) + 0.2
        M_ih  <- decay M_ih + eta h x^T     M_hh <- decay M_hh + eta h h^T     (h: after integration)
        then M is scaled down to the norm 0.3 |W| if it is longer

    Hasani et al. 2021, Liquid time-constant networks (arXiv 2006.04439).
    """

    def __init__(self, hidden_size: int, *, integration: Integration, trace_mode: TraceMode, trace_grad: bool) -> None:
        super().__init__()
        self.integration = integration
        self.trace_mode: TraceMode = trace_mode
        self.trace_grad = trace_grad
        self.ih = PlasticSynapse(hidden_size)
        self.hh = PlasticSynapse(hidden_size)
        self.tau_input = nn.Linear(2 * hidden_size, hidden_size)
        self.tau_output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Float[Tensor, "B D"],
        norm: nn.LayerNorm,
        *,
        keep: Float[Tensor, "B T D"] | None = None,
        fresh: Bool[Tensor, "B T"] | None = None,
        traces: Traces | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Traces | None]:
        """States `keep * norm(end point + x)` of all tokens, the next token's start each, and the traces after them.

        A token is read with the traces of the tokens before it, and then added to them; without `traces` the synapses
        are W alone.  Where `fresh` is set, a sequence forgets state and traces before the token.  x, state and traces
        are in at least fp32.
        """
        synapses = None
        if traces is not None:
            ih, hh = (s.rule(mode=self.trace_mode, differentiable=self.trace_grad) for s in (self.ih, self.hh))
            synapses = Synapses(ih, hh)
        behind = Norm(_wide(norm.weight), _wide(norm.bias), norm.eps)
        return liquid_cell(
            x, state, self.weights(), behind, self.integration, keep=keep, fresh=fresh, synapses=synapses, traces=traces
        )

    def weights(self) -> CellWeights:
        tau_x, tau_h = self.tau_input.weight.chunk(2, dim=1)
        return CellWeights(
            input=torch.cat((self.ih.weight, tau_x)),
            input_bias=torch.cat((_wide(self.ih.bias) + _wide(self.hh.bias), _wide(self.tau_input.bias))),
            hidden=torch.cat((self.hh.weight, tau_h)),
            tau=self.tau_output.weight,
            tau_bias=_wide(self.tau_output.bias),
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
