"""Adding a gradient to its fp32 sum."""

from lfm.kernels.accumulation.op import accumulate_

__all__ = ["accumulate_"]
