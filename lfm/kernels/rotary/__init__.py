"""Rotary position embedding of the heads in a fused query/key/value projection."""

from lfm.kernels.rotary.op import rotated_heads

__all__ = ["rotated_heads"]
