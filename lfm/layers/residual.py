"""The residual stream of a pre-norm model."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lfm.layers.norm import RMSNorm


class ResidualStream(NamedTuple):
    """Two summands: what came in, and what the part before put out and nobody has added yet.

    Each part adds them in one pass with its norm.  A tuple, as ZeRO-3 looks for tensors in tuples alone.
    """

    x: Float[Tensor, "B T D"]
    pending: Float[Tensor, "B T D"] | None = None

    def normed(self, norm: RMSNorm) -> tuple["ResidualStream", Float[Tensor, "B T D"]]:
        """The stream as one summand, and the same normalized."""
        x, normalized = norm.add_norm(self.x, self.pending)
        return ResidualStream(x), normalized

    def plus(self, y: Float[Tensor, "B T D"]) -> "ResidualStream":
        """With the output of a part."""
        return ResidualStream(self.summed(), y)

    def summed(self) -> Float[Tensor, "B T D"]:
        """As one tensor: at the ends of a stage, and around a recomputation, which keeps one and not two."""
        return self.x if self.pending is None else self.x + self.pending
