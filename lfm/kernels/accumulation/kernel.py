"""Triton kernel of accumulation: vectors of both dtypes, where PyTorch's mixed addition goes element by element."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def _accumulate_kernel(total, grad, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(total + i, i < n) + tl.load(grad + i, i < n).to(tl.float32)
    tl.store(total + i, sums, i < n)


def accumulate_kernel_(total: Tensor, grad: Tensor) -> None:
    """As `op.accumulate_`, of contiguous tensors."""
    if total.numel():
        _accumulate_kernel[(triton.cdiv(total.numel(), BLOCK),)](total, grad, total.numel(), BLOCK, num_warps=NUM_WARPS)
