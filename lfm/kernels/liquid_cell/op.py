"""`liquid_cell`: the check of what goes together, before the equations."""

from jaxtyping import Bool, Float
from torch import Tensor

from lfm.kernels.liquid_cell.reference import CellWeights, Integration, Norm, Synapses, Traces, liquid_cell_reference


def liquid_cell(
    x: Float[Tensor, "B T D"],
    state: Float[Tensor, "B D"],
    weights: CellWeights,
    norm: Norm,
    integration: Integration,
    *,
    keep: Float[Tensor, "B T D"] | None = None,
    fresh: Bool[Tensor, "B T"] | None = None,
    synapses: Synapses | None = None,
    traces: Traces | None = None,
) -> tuple[Float[Tensor, "B T D"], Traces | None]:
    """The states `keep * norm(end point + x)` of T tokens, each the start of the next; the equations are in the README.

    x, state: in at least fp32, in which everything is computed; state `[B, D]` is the first token's start.
    keep: what each state is multiplied by (dropout), without a gradient; None is 1.
    fresh: True where a sequence forgets its state and traces before a token.
    synapses, traces: of a plastic cell, both or neither.  Tokens are read with the traces of those before them.

    Returns the states and the traces behind the last token.  All but keep and fresh have gradients.
    """
    if (synapses is None) != (traces is None):
        raise ValueError("synapses and traces go together; one of them is None")
    return liquid_cell_reference(x, state, weights, norm, integration, keep, fresh, synapses, traces)
