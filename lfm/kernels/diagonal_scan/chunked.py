"""A first-order linear recurrence in about 2 sqrt(T) dependent steps, exact to rounding for any decay."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_recurrence(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    """Every `x_t = decay_t x_{t-1} + drive_t` of `[B, T, D]`, with x_{-1} = start `[B, D]`; all of one dtype.

    Time is cut into ceil(sqrt(T)) chunks of as many positions, which depends on T alone.  All chunks walk through
    their positions together, from zero, and keep the product of their decays beside the sum; then the carry walks from
    chunk to chunk and is added everywhere.  Products of decays may underflow, to the zero that they then are: nothing
    is ever divided by them.
    """
    num_positions = drive.shape[1]
    length = math.isqrt(num_positions - 1) + 1
    num_chunks = -(-num_positions // length)
    padding = (0, 0, 0, num_chunks * length - num_positions)
    # [B, C, L, D], copies that are overwritten: from position 0 of the chunk on, the product and the sum.
    product, x = (F.pad(t, padding).unflatten(1, (num_chunks, length)).clone() for t in (decay, drive))
    for i in range(1, length):
        x[:, :, i].addcmul_(product[:, :, i], x[:, :, i - 1])
        product[:, :, i].mul_(product[:, :, i - 1])
    carries = [start]
    for chunk in range(num_chunks - 1):
        carries.append(torch.addcmul(x[:, chunk, -1], product[:, chunk, -1], carries[-1]))
    x.addcmul_(product, torch.stack(carries, dim=1)[:, :, None])
    return x.flatten(1, 2)[:, :num_positions]
