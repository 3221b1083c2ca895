"""The diagonal scan behind one fused projection, and the gate on what comes out of it."""

from lfm.kernels.gated_scan.op import gated_scan

__all__ = ["gated_scan"]
