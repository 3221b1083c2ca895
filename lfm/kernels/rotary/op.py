"""`rotated_heads`: checks, the choice of path, and the gradient, a rotation by the negative angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, runs_triton
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
    if cos.dtype == torch.float64 or not runs_triton(qkv, backend):
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
