"""Triton kernel of rotary position embedding.  A program rotates up to HEADS heads of one position."""

import triton
import triton.language as tl
from torch import Tensor

from lfm.kernels.rotary.reference import split_heads

HEADS, NUM_WARPS = 8, 2


@triton.jit
def _rotate_kernel(
    x,
    out,
    cos,
    sin,
    T,
    num_heads,
    x_batch,
    x_head,
    x_position,
    out_batch,
    out_head,
    out_position,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    num_head_blocks = tl.cdiv(num_heads, HEADS)
    position = (tl.program_id(0) // num_head_blocks).to(tl.int64)  # of all rows
    batch, t = position // T, position % T
    head = (tl.program_id(0) % num_head_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    exists = (head < num_heads) & (j < HALF)  # [HEADS, WIDTH]
    source = x + batch * x_batch + t * x_position + head * x_head + j
    target = out + batch * out_batch + t * out_position + head * out_head + j
    c = tl.load(cos + position * HALF + j, j < HALF, other=0).to(tl.float32)
    s = tl.load(sin + position * HALF + j, j < HALF, other=0).to(tl.float32)
    if BACKWARDS:
        s = -s
    first = tl.load(source, exists, other=0).to(tl.float32)
    second = tl.load(source + HALF, exists, other=0).to(tl.float32)
    tl.store(target, first * c - second * s, exists)
    tl.store(target + HALF, second * c + first * s, exists)


def rotated_heads_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `op.rotated_heads`, of contiguous tables."""
    q, k, v = split_heads(qkv, head_size, num_groups)
    rotated_q, rotated_k = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
    _rotate_into(rotated_q, q, cos, sin)
    _rotate_into(rotated_k, k, cos, sin)
    return rotated_q, rotated_k, v


def rotated_heads_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
) -> Tensor:
    """Gradient `[B, T, (H + 2G) K]` of the projection."""
    B, H, T, _ = grad_q.shape
    grad = grad_q.new_empty(B, T, (H + 2 * num_groups) * head_size)
    q, k, v = split_heads(grad, head_size, num_groups)
    _rotate_into(q, grad_q, cos, sin, backwards=True)
    _rotate_into(k, grad_k, cos, sin, backwards=True)
    v.copy_(grad_v)
    return grad


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, backwards: bool = False) -> None:
    """Write x rotated, `[B, H, T, K]`, to `out`; both with any strides but the last, which must be 1.

    cos, sin: contiguous `[B, 1, T, K/2]`.
    """
    B, H, T, K = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    if x.numel() == 0:
        return
    heads = min(HEADS, triton.next_power_of_2(H))
    strides = (*x.stride()[:3], *out.stride()[:3])
    _rotate_kernel[(B * T * triton.cdiv(H, heads),)](
        x, out, cos, sin, T, H, *strides, K // 2, triton.next_power_of_2(K // 2), heads, backwards, num_warps=NUM_WARPS
    )
