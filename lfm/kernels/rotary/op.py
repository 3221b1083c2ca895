"""`rotated_heads`: checks, the choice of path, and the gradient, a rotation by the negative angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, runs_triton
from lfm.kernels.rotary.reference import rotated_heads_reference, split_heads


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
    if cos.dtype == torch.float64 or not runs_triton(qkv, backend):
        return rotated_heads_reference(qkv, cos, sin, head_size, num_groups)
    return _RotatedHeads.apply(qkv, cos.contiguous(), sin.contiguous(), head_size, num_groups)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lfm.kernels.rotary.kernel import rotate_into

        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.heads = qkv.shape, (head_size, num_groups)
        q, k, v = split_heads(qkv, head_size, num_groups)
        rotated = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k)]
        for x, out in zip((q, k), rotated, strict=True):
            rotate_into(out, x, cos, sin)
        return rotated[0], rotated[1], v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.rotary.kernel import rotate_into

        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grad_outputs
        grad = grad_q.new_empty(ctx.shape)
        q, k, v = split_heads(grad, *ctx.heads)
        for out, x in ((q, grad_q), (k, grad_k)):
            rotate_into(out, x, cos, sin, backwards=True)
        v.copy_(grad_v)
        return grad, None, None, None, None
