"""`accumulate_`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.accumulation.reference import accumulate_reference_
from lfm.kernels.backend import Backend, draw, runs_triton


def accumulate_(total: Tensor, grad: Tensor, *, backend: Backend = "auto") -> None:
    """`total += grad`, in total's dtype, in place: a gradient in bf16 to its sum in fp32, of one shape."""
    if total.shape != grad.shape:
        raise ValueError(f"total has shape {list(total.shape)}, grad {list(grad.shape)}; they must agree")
    dense = total.is_contiguous() and grad.is_contiguous() and total.dtype == torch.float32
    if (dense or backend == "triton") and runs_triton(grad, backend, _comparison):
        from lfm.kernels.accumulation.kernel import accumulate_kernel_

        accumulate_kernel_(total, grad)
    else:
        accumulate_reference_(total, grad)


def _comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    total, grad = draw(0, 9001, device=device, dtype=torch.float32), draw(1, 9001, device=device, dtype=dtype)
    want = total.clone()
    accumulate_(total, grad, backend="triton")
    accumulate_reference_(want, grad)
    yield "the sum", total, want
