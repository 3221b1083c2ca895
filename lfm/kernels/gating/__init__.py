"""What LAERC does with a token between its products: the gate's input, the gate, and a scaled sum."""

from lfm.kernels.gating.op import gated, joined_norm, scaled_sum

__all__ = ["gated", "joined_norm", "scaled_sum"]
