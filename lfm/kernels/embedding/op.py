"""`embedding` and `add_rows_`: checks, the choice of path, autograd."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.embedding.reference import add_rows_reference_
from lfm.kernels.gradient_sum import gradient_sum


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`weight[ids]`: int64 `[...]`, `[V, D]` -> `[..., D]`.

    Without a `gradient_sum` of the weight this is `torch.nn.functional.embedding`.  With one, backward adds the rows
    that occur to it, and no gradient of the size of the whole weight is made.
    """
    if gradient_sum(weight) is None or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    return _Embedding.apply(ids, weight)


def add_rows_(total: Tensor, ids: Tensor, rows: Tensor, *, backend: Backend = "auto") -> None:
    """`total[ids[i]] += rows[i]`, in total's dtype: `[V, D]`, int64 `[n]` below V, `[n, D]`.

    The kernel has the same bits every time, and adds the rows of an id up before they meet the total.
    """
    if ids.dtype != torch.int64 or rows.shape != (*ids.shape, total.shape[1]) or ids.dim() != 1:
        raise ValueError(
            f"total has shape {list(total.shape)}, ids is {ids.dtype} of shape {list(ids.shape)}, rows has "
            f"{list(rows.shape)}; they must be [V, D], torch.int64 [n] and [n, D]"
        )
    dense = total.is_contiguous() and total.dtype == torch.float32
    if (dense or backend == "triton") and runs_triton(rows, backend, _comparison):
        from lfm.kernels.embedding.kernel import add_rows_kernel_

        add_rows_kernel_(total, ids.contiguous(), rows.contiguous())
    else:
        add_rows_reference_(total, ids, rows)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.sum = gradient_sum(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        grad = grad_outputs[0]

        def product(total: Tensor, add: bool) -> None:
            if not add:
                total.zero_()
            add_rows_(total, ids.flatten(), grad.reshape(-1, grad.shape[-1]))

        if ctx.needs_input_grad[1]:
            ctx.sum.put(product)
        return None, None


def _comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    ids = draw(0, 300, device=device, dtype=torch.float32).abs().mul(9).long()  # some often, some never
    ids[::2] = 3  # so often that several programs share it
    total, rows = draw(1, 64, 1100, device=device, dtype=torch.float32), draw(2, 300, 1100, device=device, dtype=dtype)
    want = total.clone()
    add_rows_(total, ids, rows, backend="triton")
    add_rows_reference_(want, ids, rows)
    yield "the sums", total, want
