"""`grouped_linear`: checks, the choice of path, and the closed-form gradients."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Comparison, compute_capability, disagreement, draw
from lfm.kernels.gradient_sum import gradient_sum
from lfm.kernels.grouped_linear.products import Plain, Products, Quack, Torch
from lfm.kernels.grouped_linear.reference import grouped_linear_reference

Backend = Literal["auto", "quack", "torch", "reference"]


def grouped_linear(
    rows: Tensor, weight: Tensor, boundaries: Tensor, *, covered: bool = True, backend: Backend = "auto"
) -> Tensor:
    """`y[i] = weight[e] rows[i]` for `boundaries[e] <= i < boundaries[e + 1]`; rows past the last boundary give 0.

    rows: `[m, K]`; weight: `[E, N, K]`; boundaries: int32 `[E + 1]` on the same device, from 0 on, not falling.
    covered: no row lies past the last boundary.  Returns `[m, N]`.

    "quack" and "torch" are for bf16 on a GPU, K and N that 8 divides, and never wait for the device; "reference" does.
    "auto" takes quack-kernels on Hopper GPUs where they are installed and, once per process and widths, were seen to be
    right; else PyTorch's grouped product, and else the reference.

    With a `gradient_sum` of the weight, backward makes the gradient of rows first and then puts the weight's into it:
    the products of "quack" and "reference" add in the sum's dtype, those of "torch" are rounded before.
    """
    _check(rows, weight, boundaries)
    if backend == "auto":
        backend = _best_backend(rows, weight)
    products = _products(backend, weight, boundaries)
    return _GroupedLinear.apply(rows, weight, boundaries, covered or backend == "reference", products)


def _products(backend: Backend, weight: Tensor, boundaries: Tensor) -> Products:
    if backend == "reference":
        return Plain(boundaries)
    if backend == "torch":
        return Torch()
    return Quack(adds=gradient_sum(weight) is not None and _quack_adds(weight.device, *weight.shape[1:]))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, boundaries: Tensor, covered: bool, products: Products
    ) -> Tensor:
        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sum = gradient_sum(weight)
        rows, weight = rows.contiguous(), weight.contiguous()
        ctx.save_for_backward(rows, weight, boundaries)
        ctx.covered, ctx.products = covered, products
        return _zero_behind(products.by_weights(rows, weight.mT, boundaries), boundaries, covered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, boundaries = ctx.saved_tensors
        grad, (needs_rows, needs_weight) = grad_outputs[0].contiguous(), ctx.needs_input_grad[:2]
        grad_rows = grad_weight = None
        if needs_rows:
            grad_rows = ctx.products.by_weights(grad, weight, boundaries)
            grad_rows = _zero_behind(grad_rows, boundaries, ctx.covered)
        if needs_weight and ctx.sum is not None:
            products = ctx.products
            ctx.sum.put(lambda total, add: products.add_by_rows_(total, grad, rows, boundaries, add))
        elif needs_weight:
            grad_weight = ctx.products.by_rows(grad, rows, boundaries)
        return grad_rows, grad_weight, None, None, None


def _zero_behind(x: Tensor, boundaries: Tensor, covered: bool) -> Tensor:
    if covered:
        return x
    return torch.where((torch.arange(len(x), device=x.device) < boundaries[-1])[:, None], x, 0)


def never_waits(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether backend "auto" makes the products of matrices of these widths without a look at the boundaries."""
    return device.type == "cuda" and dtype == torch.bfloat16 and not any(width % 8 for width in widths)


def _best_backend(rows: Tensor, weight: Tensor) -> Backend:
    _, N, K = weight.shape
    if not (never_waits(rows.device, rows.dtype, N, K) and len(rows)):
        return "reference"
    return "quack" if _quack_is_right(rows.device, N, K) else "torch"


@functools.cache
def _quack_is_right(device: torch.device, N: int, K: int) -> bool:
    if Quack.installed_version is None or (compute_capability(device) or (0, 0))[0] != 9:
        return False
    return _agrees(_comparison, device, N, K, "uses PyTorch's, which take a sixth longer")


@functools.cache
def _quack_adds(device: torch.device, N: int, K: int) -> bool:
    return _agrees(_sum_comparison, device, N, K, "adds weight gradients up by a kernel of their own, which is slower")


def _agrees(comparison: Comparison, device: torch.device, N: int, K: int, instead: str) -> bool:
    failure = disagreement(comparison, device, torch.bfloat16, N, K)
    if failure is not None:
        warnings.warn(
            f"grouped_linear: the products of quack-kernels {Quack.installed_version} {failure} on "
            f"{torch.cuda.get_device_name(device)}; this process {instead}",
            RuntimeWarning,
            stacklevel=5,
        )
    return failure is None


def _problem(device: torch.device, dtype: torch.dtype, N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    boundaries = torch.tensor([0, 70, 70, 333], dtype=torch.int32, device=device)
    rows, weight = draw(0, 333, K, device=device, dtype=dtype), draw(1, 3, N, K, device=device, dtype=dtype)
    return rows, weight, boundaries, draw(2, 333, N, device=device, dtype=dtype)


def _comparison(device: torch.device, dtype: torch.dtype, N: int, K: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows, weight, boundaries, grad = _problem(device, dtype, N, K)
    leaves = [part.requires_grad_() for part in (rows, weight)]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    got = grouped_linear(leaves[0], leaves[1], boundaries, backend="quack")
    want = grouped_linear_reference(wide[0], wide[1], boundaries)
    yield "the outputs", got, want
    right = torch.autograd.grad(want, wide, grad.float())
    pairs = zip(torch.autograd.grad(got, leaves, grad), right, strict=True)
    yield from (("a gradient", *pair) for pair in pairs)


def _sum_comparison(device: torch.device, dtype: torch.dtype, N: int, K: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows, weight, boundaries, grad = _problem(device, dtype, N, K)
    total = torch.full(weight.shape, torch.nan, device=device)
    want = Plain(boundaries).by_rows(grad.float(), rows.float(), boundaries)
    for times in (1, 2):
        Quack().add_by_rows_(total, grad, rows, boundaries, times > 1)
        yield "a sum of gradients", total, want * times


def _check(rows: Tensor, weight: Tensor, boundaries: Tensor) -> None:
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[2]:
        raise ValueError(
            f"rows has shape {list(rows.shape)}, weight {list(weight.shape)}; they must be [m, K] and [E, N, K]"
        )
    if boundaries.dtype != torch.int32 or boundaries.shape != (len(weight) + 1,):
        raise ValueError(
            f"boundaries is {boundaries.dtype} of shape {list(boundaries.shape)}; it must be torch.int32 "
            f"[{len(weight) + 1}]"
        )
