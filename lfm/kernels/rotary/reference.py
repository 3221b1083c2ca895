"""The definition of rotary position embedding, half-split pairing.  Su et al. 2021, arXiv 2104.09864."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension j of the first half with dimension j + K/2; computed in the tables' dtype, returned in x's."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def split_heads(qkv: Tensor, head_size: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views `[B, H, T, K]`, `[B, G, T, K]` and `[B, G, T, K]` of `qkv [B, T, (H + 2G) K]`."""
    heads = qkv.unflatten(-1, (-1, head_size)).transpose(1, 2)
    num_heads = heads.shape[1] - 2 * num_groups
    q, k, v = heads.split((num_heads, num_groups, num_groups), dim=1)
    return q, k, v


def rotated_heads_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_heads(qkv, head_size, num_groups)
    return rotate(q, cos, sin), rotate(k, cos, sin), v
