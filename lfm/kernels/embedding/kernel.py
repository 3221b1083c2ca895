"""Triton kernels of `add_rows_`: programs add up the rows of one id, some columns of them, without atomics.

There is a program for every position of the sorted ids; those that begin a segment of an id's rows have something to
do.  An id with several segments, such as that of the commonest word, has its segments added up by a second kernel, or
its one program would be the time of all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, NUM_WARPS = 8, 1024, 8
SEGMENT = 64
"""Rows that a program adds up."""


@triton.jit
def _add_rows_kernel(
    total, rows, keys, order, begins, ends, parts, long_runs, D, num_blocks, num_parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A segment's sum goes to the total, or, of an id that has several, to `parts`."""
    first = (tl.program_id(0) // num_blocks).to(tl.int64)
    begin, end = tl.load(begins + first), tl.load(ends + first)
    if (first - begin) % SEGMENT == 0:
        column = (tl.program_id(0) % num_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        exists = column < D
        sums = tl.zeros([COLUMNS], tl.float32)
        for start in range(first, tl.minimum(first + SEGMENT, end), ROWS):
            place = start + tl.arange(0, ROWS)
            row = tl.load(order + place, place < end, other=0)
            at = rows + row[:, None] * D + column[None, :]
            part = tl.load(at, (place < end)[:, None] & exists[None, :], other=0)  # [ROWS, COLUMNS]
            sums += tl.sum(part.to(tl.float32), 0)
        if end - begin <= SEGMENT:
            at = total + tl.load(keys + first) * D + column
            tl.store(at, tl.load(at, exists, other=0) + sums, exists)
        else:
            # First segments, and later ones, lie SEGMENT or more apart among themselves.
            slot = first // SEGMENT
            if first == begin:
                tl.store(long_runs + slot, first.to(tl.int32))
            tl.store(parts + ((first != begin) * num_parts + slot) * D + column, sums, exists)


@triton.jit
def _add_parts_kernel(
    total, keys, ends, parts, long_runs, D, num_blocks, num_parts, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr
):
    """Of the id whose rows begin in this slot, if it has several segments: in their order."""
    slot = tl.program_id(0) // num_blocks
    first = tl.load(long_runs + slot).to(tl.int64)
    if first >= 0:
        column = (tl.program_id(0) % num_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        exists = column < D
        sums = tl.load(parts + slot.to(tl.int64) * D + column, exists, other=0)
        for start in range(first + SEGMENT, tl.load(ends + first), SEGMENT):
            sums += tl.load(parts + (num_parts + start // SEGMENT) * D + column, exists, other=0)
        at = total + tl.load(keys + first) * D + column
        tl.store(at, tl.load(at, exists, other=0) + sums, exists)


def add_rows_kernel_(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """As `op.add_rows_`, of contiguous tensors."""
    n, D = rows.shape
    if not n or not D:
        return
    keys, order = ids.sort(stable=True)
    begins, ends = torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True)
    num_parts = triton.cdiv(n, SEGMENT)
    parts = rows.new_empty(2, num_parts, D, dtype=torch.float32)
    long_runs = torch.full((num_parts,), -1, dtype=torch.int32, device=rows.device)
    num_blocks, columns = triton.cdiv(D, COLUMNS), min(COLUMNS, triton.next_power_of_2(D))
    _add_rows_kernel[(n * num_blocks,)](
        total, rows, keys, order, begins, ends, parts, long_runs, D, num_blocks, num_parts, ROWS, columns, SEGMENT,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    _add_parts_kernel[(num_parts * num_blocks,)](
        total, keys, ends, parts, long_runs, D, num_blocks, num_parts, columns, SEGMENT, num_warps=NUM_WARPS
    )
