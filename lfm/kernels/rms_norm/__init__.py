"""The residual sum and its normalization, in one pass over memory each way."""

from lfm.kernels.rms_norm.op import add_rms_norm

__all__ = ["add_rms_norm"]
