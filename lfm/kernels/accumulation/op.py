"""`accumulate_`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.accumulation.reference import accumulate_reference_
from lfm.kernels.backend import Backend, draw, runs_triton


def accumulate_(
    total: Tensor, grad: Tensor, *, factor: Tensor | None = None, add: bool = True, backend: Backend = "auto"
) -> None:
    """`total += grad`, in total's dtype, in place: a gradient in bf16 to its sum in fp32, of one shape.

    factor: a tensor of one number, in at least fp32, that multiplies the gradient.  add: else the gradient is written
    over what total holds, which is not read.
    """
    if total.shape != grad.shape:
        raise ValueError(f"total has shape {list(total.shape)}, grad {list(grad.shape)}; they must agree")
    if factor is not None and factor.numel() != 1:
        raise ValueError(f"factor has shape {list(factor.shape)}; it must be one number")
    dense = total.is_contiguous() and grad.is_contiguous() and total.dtype == torch.float32
    if (dense or backend == "triton") and runs_triton(grad, backend, _comparison):
        from lfm.kernels.accumulation.kernel import accumulate_kernel_

        accumulate_kernel_(total, grad, factor, add)
    else:
        accumulate_reference_(total, grad, factor, add)


def _comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    before, grad = draw(0, 9001, device=device, dtype=torch.float32), draw(1, 9001, device=device, dtype=dtype)
    for factor in (None, torch.tensor(1 / 3, device=device)):
        for add in (True, False):
            total, want = before.clone(), before.clone()
            accumulate_(total, grad, factor=factor, add=add, backend="triton")
            accumulate_reference_(want, grad, factor, add)
            yield "the sum", total, want
