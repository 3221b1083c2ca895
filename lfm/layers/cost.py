"""What a layer takes: weights, by what a parallel layout does with them, and useful FLOPs."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Cost:
    """Of one layer, or of one part of it; FLOPs are of a token, a multiply and an add being two."""

    sharded: int = 0
    """Weights that tensor parallelism cuts."""
    experts: int = 0
    """Cut by expert parallelism, or without it by tensor parallelism."""
    replicated: int = 0
    """Whole on every tensor rank: gains, routers, output biases, trained reservoirs; all of a family that none cuts."""
    frozen: int = 0
    """Not trained, fp32, whole on every tensor rank."""
    idle: int = 0
    """Trained, and not used by any one token: they are in the counts above too."""
    forward: int | float = 0
    backward: int | float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def trainable(self) -> int:
        return self.sharded + self.experts + self.replicated

    @property
    def flops(self) -> int | float:
        """Forward and backward."""
        return self.forward + self.backward


def matrices(*, sharded: int = 0, replicated: int = 0) -> Cost:
    """Of as many weights of matrices, which each multiply a token once."""
    weights = sharded + replicated
    return Cost(sharded=sharded, replicated=replicated, forward=2 * weights, backward=4 * weights)


def frozen_matrices(weights: int) -> Cost:
    """The same where they are not trained: a backward pass has no gradient of theirs."""
    return Cost(frozen=weights, forward=2 * weights, backward=2 * weights)
