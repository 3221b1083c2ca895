"""Cross entropy of logits that are overwritten by their gradient."""

from lfm.kernels.cross_entropy.op import cross_entropy_

__all__ = ["cross_entropy_"]
