"""`rotated_heads`: checks, the choice of path, and the gradient, a rotation by the negative angle."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.rotary.reference import rotated_heads_reference


def rotated_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, head_size: int, num_groups: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a fused projection, queries and keys rotated: dimension j with dimension j + K/2 by its angle.

    qkv: `[B, T, (H + 2G) K]`, queries, then keys, then values.
    cos, sin: `[B, 1, T, K/2]`, at least fp32; the rotation is computed in their dtype and rounded to qkv's.

    Returns q `[B, H, T, K]`, k and v `[B, G, T, K]`.  q and k have memory of their own, in the order B, T, heads, K; v
    is a view of qkv.
    """
    B, T, width = qkv.shape
    if head_size % 2 or width % head_size or width // head_size <= 2 * num_groups:
        raise ValueError(f"qkv has shape {list(qkv.shape)}: no heads of head_size={head_size}, num_groups={num_groups}")
    if not cos.shape == sin.shape == (B, 1, T, head_size // 2):
        raise ValueError(f"cos has shape {list(cos.shape)}, sin {list(sin.shape)}, not {[B, 1, T, head_size // 2]}")
    sizes = (head_size, width // head_size, num_groups)
    if cos.dtype == torch.float64 or not runs_triton(qkv, backend, _comparison, *sizes):
        return rotated_heads_reference(qkv, cos, sin, head_size, num_groups)
    return _RotatedHeads.apply(qkv, cos.contiguous(), sin.contiguous(), head_size, num_groups)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lfm.kernels.rotary.kernel import rotated_heads_forward

        ctx.save_for_backward(cos, sin)
        ctx.heads = (head_size, num_groups)
        return rotated_heads_forward(qkv, cos, sin, head_size, num_groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.rotary.kernel import rotated_heads_backward

        grad_q, grad_k, grad_v = grad_outputs
        cos, sin = ctx.saved_tensors
        return rotated_heads_backward(grad_q, grad_k, grad_v, cos, sin, *ctx.heads), None, None, None, None


def _comparison(
    device: torch.device, dtype: torch.dtype, head_size: int, num_heads: int, num_groups: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    qkv = draw(0, 1, 40, num_heads * head_size, device=device, dtype=dtype)
    angles = draw(1, 1, 1, 40, head_size // 2, device=device, dtype=torch.float32)
    leaf, wide = qkv.requires_grad_(), qkv.detach().float().requires_grad_()
    tables = (angles.cos(), angles.sin())
    got = rotated_heads(leaf, *tables, head_size=head_size, num_groups=num_groups, backend="triton")
    want = rotated_heads_reference(wide, *tables, head_size, num_groups)
    yield from zip("qkv", got, want, strict=True)
    grads = [draw(2 + i, *x.shape, device=device, dtype=dtype) for i, x in enumerate(got)]
    (right,) = torch.autograd.grad(want, wide, [grad.float() for grad in grads])
    yield "the gradient", torch.autograd.grad(got, leaf, grads)[0], right
