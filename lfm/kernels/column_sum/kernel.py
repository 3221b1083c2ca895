"""Triton kernel of the column sum.

A program adds up a share of the rows for a block of the columns, in fp32 registers.  The shares' sums are the rows of a
small matrix, which the same kernel adds up in one share.  Shares depend on the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, NUM_WARPS = 32, 128, 4
"""Of one load of a program."""
SHARE, MOST_SHARES = 128, 64
"""Rows of a share at least; shares at most."""


@triton.jit(do_not_specialize=["num_rows", "rows_of_a_share"])
def _column_sum_kernel(x, sums, num_rows, row_stride, rows_of_a_share, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    share = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    end = tl.minimum((share + 1) * rows_of_a_share, num_rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(share * rows_of_a_share, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + row * row_stride + column, (row < end) & (column < D), other=0).to(tl.float32)
    tl.store(sums + share * D + column, tl.sum(total, 0)[None, :], column < D)


def column_sum_kernel(x: Tensor) -> Tensor:
    """As `op.column_sum`, of `[n, D]` whose columns lie side by side."""
    num_rows, D = x.shape
    rows_of_a_share = max(SHARE, triton.cdiv(num_rows, MOST_SHARES * ROWS) * ROWS)
    num_shares = triton.cdiv(num_rows, rows_of_a_share)
    if num_shares > 1:
        shares = x.new_empty(num_shares, D, dtype=torch.float32)
        _launch(x, shares, rows_of_a_share)
    else:
        shares = x
    total = x.new_empty(D)
    _launch(shares, total, max(1, len(shares)))
    return total


def _launch(x: Tensor, sums: Tensor, rows_of_a_share: int) -> None:
    num_rows, D = x.shape
    grid = (triton.cdiv(D, COLUMNS), sums.numel() // D)
    _column_sum_kernel[grid](x, sums, num_rows, x.stride(0), rows_of_a_share, D, ROWS, COLUMNS, num_warps=NUM_WARPS)
