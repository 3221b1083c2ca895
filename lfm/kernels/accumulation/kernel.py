"""Triton kernel of accumulation: vectors of both dtypes, where PyTorch's mixed addition goes element by element."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def _accumulate_kernel(
    total, grad, factor, n, HAS_FACTOR: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(grad + i, i < n).to(tl.float32)
    if HAS_FACTOR:
        sums *= tl.load(factor).to(tl.float32)
    if ADD:
        sums += tl.load(total + i, i < n)
    tl.store(total + i, sums, i < n)


def accumulate_kernel_(total: Tensor, grad: Tensor, factor: Tensor | None, add: bool) -> None:
    """As `op.accumulate_`, of contiguous tensors."""
    n = total.numel()
    if n:
        arguments = (total, grad, total if factor is None else factor, n, factor is not None, add)
        _accumulate_kernel[(triton.cdiv(n, BLOCK),)](*arguments, BLOCK, num_warps=NUM_WARPS)
