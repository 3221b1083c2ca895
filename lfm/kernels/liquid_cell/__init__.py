"""A liquid cell over a window of tokens, norm and dropout included; with plastic synapses or without."""

from lfm.kernels.liquid_cell.op import liquid_cell
from lfm.kernels.liquid_cell.reference import SMALLEST_TAU, CellWeights, Integration, Integrator, Norm, Synapses, Traces
from lfm.kernels.liquid_cell.running_trace import TraceMode, TraceRule

__all__ = [
    "SMALLEST_TAU",
    "CellWeights",
    "Integration",
    "Integrator",
    "Norm",
    "Synapses",
    "TraceMode",
    "TraceRule",
    "Traces",
    "liquid_cell",
]
