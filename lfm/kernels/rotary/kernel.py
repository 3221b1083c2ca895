"""Triton kernels of rotary position embedding.  A program rotates a tile: up to HEADS heads of POSITIONS positions.

Tiles of queries and of keys, and in the backward those of values, which are only copied, are one launch: on the device
it takes less time than the host needs for a second one.
"""

import triton
import triton.language as tl
from torch import Tensor

from lfm.kernels.rotary.reference import split_heads

HEADS, POSITIONS, NUM_WARPS = 8, 1, 2


@triton.jit
def _rotated_heads_fwd_kernel(
    qkv,
    q,
    k,
    cos,
    sin,
    T,
    qkv_batch,
    qkv_position,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    K: tl.constexpr = 2 * HALF
    batch, t, block = _tile(tl.cdiv(H, HEADS) + tl.cdiv(G, HEADS), POSITIONS)
    source = qkv + batch * qkv_batch
    if block < tl.cdiv(H, HEADS):
        target = q + batch * T * (H * K)
        _rotate(source, K, qkv_position, target, H * K, cos, sin, batch, t, T, block, H, HALF, WIDTH, HEADS, 1)
    else:
        source += H * K
        target = k + batch * T * (G * K)
        block -= tl.cdiv(H, HEADS)
        _rotate(source, K, qkv_position, target, G * K, cos, sin, batch, t, T, block, G, HALF, WIDTH, HEADS, 1)


@triton.jit
def _rotated_heads_bwd_kernel(
    grad,
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    T,
    q_batch,
    q_head,
    q_position,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    batch, t, block = _tile(tl.cdiv(H, HEADS) + 2 * tl.cdiv(G, HEADS), POSITIONS)
    K: tl.constexpr = 2 * HALF
    row: tl.constexpr = (H + 2 * G) * K
    target = grad + batch * T * row
    if block < tl.cdiv(H, HEADS):
        source = grad_q + batch * q_batch
        _rotate(source, q_head, q_position, target, row, cos, sin, batch, t, T, block, H, HALF, WIDTH, HEADS, -1)
    elif block < tl.cdiv(H, HEADS) + tl.cdiv(G, HEADS):
        source = grad_k + batch * k_batch
        target += H * K
        block -= tl.cdiv(H, HEADS)
        _rotate(source, k_head, k_position, target, row, cos, sin, batch, t, T, block, G, HALF, WIDTH, HEADS, -1)
    else:
        source = grad_v + batch * v_batch
        target += (H + G) * K
        block -= tl.cdiv(H, HEADS) + tl.cdiv(G, HEADS)
        _rotate(source, v_head, v_position, target, row, cos, sin, batch, t, T, block, G, HALF, WIDTH, HEADS, 0)


@triton.jit
def _tile(num_blocks: tl.constexpr, POSITIONS: tl.constexpr):
    """Row of the batch, positions `[POSITIONS]` and block of heads; neighbours in memory are neighbours in time."""
    block = tl.program_id(0) % num_blocks
    t = tl.program_id(0) // num_blocks * POSITIONS + tl.arange(0, POSITIONS)
    return tl.program_id(1).to(tl.int64), t.to(tl.int64), block


@triton.jit
def _rotate(
    source,
    source_head,
    source_position,
    target,
    target_position,
    cos,
    sin,
    batch,
    t,
    T,
    block,
    num_heads: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """Rotate by the angle times DIRECTION; 0 copies."""
    t = t[:, None, None]
    head = block * HEADS + tl.arange(0, HEADS)[None, :, None]
    j = tl.arange(0, WIDTH)[None, None, :]
    exists = (t < T) & (head < num_heads) & (j < HALF)  # [POSITIONS, HEADS, WIDTH]
    source += t * source_position + head.to(tl.int64) * source_head + j
    target += t * target_position + head * (2 * HALF) + j
    first = tl.load(source, exists, other=0)
    second = tl.load(source + HALF, exists, other=0)
    if DIRECTION != 0:
        # Every head reads the angles anew, out of L1: in the tile's own layout, which saves a trip to shared memory.
        angle = tl.broadcast_to((batch * T + t) * HALF + j, exists.shape)
        c = tl.load(cos + angle, exists, other=0).to(tl.float32)
        s = tl.load(sin + angle, exists, other=0).to(tl.float32) * DIRECTION
        x, y = first.to(tl.float32), second.to(tl.float32)
        first, second = x * c - y * s, y * c + x * s
    tl.store(target, first, exists)
    tl.store(target + HALF, second, exists)


def rotated_heads_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `op.rotated_heads`, of contiguous tables `[B, 1, T, K/2]`."""
    (B, T, width), G = qkv.shape, num_groups
    H = width // head_size - 2 * G
    q, k = (qkv.new_empty(B, T, heads, head_size) for heads in (H, G))
    if qkv.numel():
        rows = qkv if qkv.stride(2) == 1 else qkv.contiguous()
        grid, constants = _tiles(B, T, head_size, (H, G))
        _rotated_heads_fwd_kernel[grid](rows, q, k, cos, sin, T, *rows.stride()[:2], H, G, **constants)
    return q.transpose(1, 2), k.transpose(1, 2), split_heads(qkv, head_size, G)[2]


def rotated_heads_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
) -> Tensor:
    """Gradient `[B, T, (H + 2G) K]` of the projection; the three given ones with any strides but the last."""
    (B, H, T, K), G = grad_q.shape, num_groups
    grad = grad_q.new_empty(B, T, (H + 2 * G) * K)
    if grad.numel():
        parts = [part if part.stride(3) == 1 else part.contiguous() for part in (grad_q, grad_k, grad_v)]
        strides = [stride for part in parts for stride in part.stride()[:3]]
        grid, constants = _tiles(B, T, K, (H, G, G))
        _rotated_heads_bwd_kernel[grid](grad, *parts, cos, sin, T, *strides, H, G, **constants)
    return grad


def _tiles(B: int, T: int, head_size: int, parts: tuple[int, ...]) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, and constants of a kernel, for parts of so many heads: no tile spans two of them."""
    half, heads = head_size // 2, min(HEADS, triton.next_power_of_2(max(parts)))
    tiles = triton.cdiv(T, POSITIONS) * sum(triton.cdiv(part, heads) for part in parts)
    constants = {"HALF": half, "WIDTH": triton.next_power_of_2(half), "HEADS": heads, "POSITIONS": POSITIONS}
    return (tiles, B), constants | {"num_warps": NUM_WARPS}
