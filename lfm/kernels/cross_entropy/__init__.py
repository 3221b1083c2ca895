"""Cross entropy of logits that are overwritten by their gradient, and the scaling of gradients made so early."""

from lfm.kernels.cross_entropy.op import cross_entropy_, joined_sums, scaled, shard_gradient_, shard_sums

__all__ = ["cross_entropy_", "joined_sums", "scaled", "shard_gradient_", "shard_sums"]
