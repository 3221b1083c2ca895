"""`sorted_places`, `dispatch` and `combine`: checks, the choice of path, and gradients without atomics.

`place[n, i]` is the row that copy i of token n takes: a permutation of the n * k rows.  All three therefore read or
write each row once, in any order, and have the same bits every time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.permutation.reference import (
    combine_backward_reference,
    combine_reference,
    dispatch_reference,
    sorted_places_reference,
)

_MOST_KEYS = 1024
"""The kernel compares with every key; beyond this a radix sort is the faster one."""


def sorted_places(keys: Tensor, num_keys: int, *, backend: Backend = "auto") -> Tensor:
    """Where each of `keys [m]`, integers in `0..num_keys - 1`, goes in a stable sort: int64 `[m]`, a permutation."""
    if num_keys <= _MOST_KEYS and runs_triton(keys, backend, _sort_comparison, num_keys):
        from lfm.kernels.permutation.kernel import counting_sort

        return counting_sort(keys.contiguous(), num_keys)
    return sorted_places_reference(keys)


def dispatch(x: Tensor, place: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`rows[place[n, i]] = x[n]`: `[n, D]`, int64 `[n, k]` -> `[n * k, D]`."""
    _check(x, place, num_rows=place.shape[0])
    return _Dispatch.apply(x, place, _fused(x, place, backend))


def combine(rows: Tensor, place: Tensor, weights: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """`y[n] = sum over i of weights[n, i] rows[place[n, i]]`: `[n * k, D]`, int64 `[n, k]`, `[n, k]` -> `[n, D]`.

    Without weights they are 1.  The kernel multiplies and adds in fp32 and rounds once; the weights' gradient is
    formed in fp32.
    """
    _check(rows, place, num_rows=place.numel())
    if weights is None:
        return _Sum.apply(rows, place, _fused(rows, place, backend))
    if weights.shape != place.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}, place {list(place.shape)}; they must agree")
    return _Combine.apply(rows, place, weights, _fused(rows, place, backend))


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(place)
        ctx.fused = fused
        return _dispatch(x, place, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (place,) = ctx.saved_tensors
        return _combine(grad_outputs[0], place, None, ctx.fused), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(place)
        ctx.fused = fused
        return _combine(rows, place, None, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (place,) = ctx.saved_tensors
        return _dispatch(grad_outputs[0], place, ctx.fused), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, weights: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(rows, place, weights)
        ctx.fused = fused
        return _combine(rows, place, weights, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, place, weights = ctx.saved_tensors
        if ctx.fused:
            from lfm.kernels.permutation.kernel import combine_backward

            inputs = (grad_outputs[0].contiguous(), rows.contiguous(), place.contiguous(), weights.contiguous())
            grad_rows, grad_weights = combine_backward(*inputs)
        else:
            grad_rows, grad_weights = combine_backward_reference(grad_outputs[0], rows, place, weights)
        return grad_rows, None, grad_weights, None


def _dispatch(x: Tensor, place: Tensor, fused: bool) -> Tensor:
    if not fused:
        return dispatch_reference(x, place)
    from lfm.kernels.permutation.kernel import dispatch_forward

    return dispatch_forward(x.contiguous(), place.contiguous())


def _combine(rows: Tensor, place: Tensor, weights: Tensor | None, fused: bool) -> Tensor:
    if not fused:
        return combine_reference(rows, place, weights)
    from lfm.kernels.permutation.kernel import combine_forward

    return combine_forward(rows.contiguous(), place.contiguous(), None if weights is None else weights.contiguous())


def _fused(x: Tensor, place: Tensor, backend: Backend) -> bool:
    return runs_triton(x, backend, _move_comparison, place.shape[1], x.shape[1])


def _sort_comparison(device: torch.device, dtype: torch.dtype, num_keys: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    keys = draw(0, 3000, device=device, dtype=torch.float32).mul(1e6).to(dtype) % num_keys
    yield "the places", sorted_places(keys, num_keys, backend="triton"), sorted_places_reference(keys)


def _move_comparison(device: torch.device, dtype: torch.dtype, k: int, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    n = 40
    place = draw(0, n * k, device=device, dtype=torch.float32).argsort().view(n, k)
    x, grad = (draw(seed, n, D, device=device, dtype=dtype) for seed in (1, 2))
    rows, weights = draw(3, n * k, D, device=device, dtype=dtype), draw(4, n, k, device=device, dtype=torch.float32)
    yield "the rows", dispatch(x, place, backend="triton"), dispatch_reference(x, place)
    yield "their sums", combine(rows, place, backend="triton"), combine_reference(rows.float(), place, None)
    leaves = [rows.requires_grad_(), weights.requires_grad_()]
    y = combine(rows, place, weights, backend="triton")
    yield "the weighted sums", y, combine_reference(rows.float(), place, weights)
    got = torch.autograd.grad(y, leaves, grad)
    want = combine_backward_reference(grad.float(), rows.float(), place, weights)
    yield from zip(("the gradient of rows", "the gradient of weights"), got, want, strict=True)


def _check(x: Tensor, place: Tensor, *, num_rows: int) -> None:
    if place.dtype != torch.int64 or place.dim() != 2:
        raise ValueError(f"place is {place.dtype} of shape {list(place.shape)}; it must be torch.int64 [n, k]")
    if x.dim() != 2 or len(x) != num_rows:
        raise ValueError(f"the rows have shape {list(x.shape)}; place {list(place.shape)} needs [{num_rows}, D]")
