"""Triton kernel of `add_rows_`: a program adds up the rows of one id, some columns of them, without atomics.

There is a program for every position of the sorted ids; all but the first of each id have nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, NUM_WARPS = 8, 1024, 8


@triton.jit
def _add_rows_kernel(
    total, rows, keys, order, ends, D, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    first = (tl.program_id(0) // num_blocks).to(tl.int64)
    key = tl.load(keys + first)
    if key != tl.load(keys + first - 1, first > 0, other=-1):
        column = (tl.program_id(0) % num_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        exists = column < D
        end = tl.load(ends + first)
        sums = tl.load(total + key * D + column, exists, other=0)  # [COLUMNS]
        for start in range(first, end, ROWS):
            place = start + tl.arange(0, ROWS)
            row = tl.load(order + place, place < end, other=0)
            at = rows + row[:, None] * D + column[None, :]
            part = tl.load(at, (place < end)[:, None] & exists[None, :], other=0)  # [ROWS, COLUMNS]
            sums += tl.sum(part.to(tl.float32), 0)
        tl.store(total + key * D + column, sums, exists)


def add_rows_kernel_(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """As `op.add_rows_`, of contiguous tensors."""
    n, D = rows.shape
    if not n or not D:
        return
    keys, order = ids.sort(stable=True)
    ends = torch.searchsorted(keys, keys, right=True)
    num_blocks = triton.cdiv(D, COLUMNS)
    columns = min(COLUMNS, triton.next_power_of_2(D))
    arguments = (total, rows, keys, order, ends, D, num_blocks, ROWS, columns)
    _add_rows_kernel[(n * num_blocks,)](*arguments, num_warps=NUM_WARPS)
