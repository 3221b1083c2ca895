"""Rows of a table by id; their gradients go to the table's fp32 sum, of the rows that occur alone."""

from lfm.kernels.embedding.op import add_rows_, embedding

__all__ = ["add_rows_", "embedding"]
