"""The diagonal gated scan: one leaky unit a channel, with a decay of its own at every token."""

from lfm.kernels.diagonal_scan.op import diagonal_scan

__all__ = ["diagonal_scan"]
