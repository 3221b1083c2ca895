"""The activation of gated feed-forward layers, in one pass over memory each way."""

from lfm.kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
