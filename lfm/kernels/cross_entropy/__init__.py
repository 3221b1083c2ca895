"""Cross entropy of logits that are overwritten by their gradient, and the scaling of gradients made so early."""

from lfm.kernels.cross_entropy.op import cross_entropy_, scaled

__all__ = ["cross_entropy_", "scaled"]
