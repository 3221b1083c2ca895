"""One AdamW update of a tensor, with clipping and the working copy in the same pass."""

from lfm.kernels.adamw.op import adamw_

__all__ = ["adamw_"]
