"""Layer normalization of rows, forward and backward in one kernel each."""

from lfm.kernels.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
