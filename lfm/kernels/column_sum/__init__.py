"""The sum of a matrix over its rows, as a bias has it for its gradient."""

from lfm.kernels.column_sum.op import column_sum

__all__ = ["column_sum"]
