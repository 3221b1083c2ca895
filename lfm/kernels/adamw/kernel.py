"""Triton kernels of an AdamW update: each number is read and written once.

A program owns BLOCK elements, of one large tensor that has a launch of its own, or of one of many small ones that share
a launch: then it finds in a table which, and where that lies.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 8
LARGE = 1 << 22
"""Elements from which on a tensor takes so long that a launch of its own does not show."""


@triton.jit
def _update(
    parameter, grad, exp_avg, exp_avg_sq, working, lr, decay, shared, i, n, beta1, beta2, eps,
    PUBLISHED: tl.constexpr,
):  # fmt: skip
    """Those of elements i that are below n; none where `shared` says that the update is refused."""
    exists = i < tl.where(tl.load(shared + 3) == 0, n, 0)
    p, g = tl.load(parameter + i, exists), tl.load(grad + i, exists) * tl.load(shared + 2)
    m, v = tl.load(exp_avg + i, exists), tl.load(exp_avg_sq + i, exists)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    update = tl.load(shared) * m / (tl.sqrt_rn(v * tl.load(shared + 1)) + eps)
    p = p * (1 - lr * decay) - lr * update
    tl.store(parameter + i, p, exists)
    tl.store(exp_avg + i, m, exists)
    tl.store(exp_avg_sq + i, v, exists)
    if PUBLISHED:
        tl.store(working + i, p, exists)


@triton.jit
def _adamw_kernel(
    parameter, grad, exp_avg, exp_avg_sq, working, lr, shared, beta1, beta2, eps, decay, n,
    PUBLISHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _update(
        parameter, grad, exp_avg, exp_avg_sq, working, tl.load(lr), decay, shared, i, n, beta1, beta2, eps, PUBLISHED
    )  # fmt: skip


@triton.jit
def _adamw_of_many_kernel(
    places, owners, sizes, firsts, lrs, decays, shared, beta1, beta2, eps,
    PUBLISHED: tl.constexpr, NARROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0))
    at = places + owner * 5
    parameter = tl.load(at).to(tl.pointer_type(tl.float32))
    grad = tl.load(at + 1).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(at + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(at + 3).to(tl.pointer_type(tl.float32))
    working = tl.load(at + 4).to(tl.pointer_type(NARROW))
    if ALIGNED:
        parameter, grad = tl.multiple_of(parameter, 16), tl.multiple_of(grad, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        working = tl.multiple_of(working, 16)
    i = (tl.program_id(0) - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lr, decay, n = tl.load(lrs + owner), tl.load(decays + owner), tl.load(sizes + owner)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    _update(
        parameter, grad, exp_avg, exp_avg_sq, working, lr, decay, shared, i, n, beta1, beta2, eps, PUBLISHED
    )  # fmt: skip


class _Table(NamedTuple):
    """Of tensors of one launch, on their device."""

    places: Tensor
    """int64 `[N, 5]`: addresses of parameter, gradient, moments and working copy."""
    owners: Tensor
    """int32 `[programs]`: whose elements a program has."""
    sizes: Tensor
    """int64 `[N]`: elements."""
    firsts: Tensor
    """int32 `[N]`: the first program of each."""
    decays: Tensor
    """fp32 `[N]`."""


_NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def adamw_kernel_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lrs: Tensor,
    shared: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decays: Sequence[float],
    workings: Sequence[Tensor | None],
) -> None:
    """As `op.adamw_`, of contiguous tensors."""
    # What one launch can take together: it loads four numbers at once where all of them begin and end so.
    together: dict[tuple[torch.dtype | None, bool], list[int]] = {}
    tensors = list(zip(parameters, grads, exp_avgs, exp_avg_sqs, workings, strict=True))
    places = [tuple(0 if x is None else x.data_ptr() for x in each) for each in tensors]
    for k, (parameter, grad, exp_avg, exp_avg_sq, working) in enumerate(tensors):
        n = parameter.numel()
        if n >= LARGE:
            _adamw_kernel[(triton.cdiv(n, BLOCK),)](
                parameter, grad, exp_avg, exp_avg_sq, parameter if working is None else working, lrs[k], shared,
                *betas, eps, weight_decays[k], n,
                PUBLISHED=working is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        elif n > 0:
            aligned = n % 16 == 0 and all(place % 16 == 0 for place in places[k])
            together.setdefault((None if working is None else working.dtype, aligned), []).append(k)
    for (dtype, aligned), chosen in together.items():
        sizes, decays = (tuple(each[k] for k in chosen) for each in ([p.numel() for p in parameters], weight_decays))
        table = _table(tuple(places[k] for k in chosen), sizes, decays, parameters[0].device)
        rates = lrs if len(chosen) == len(parameters) else lrs[_index(tuple(chosen), lrs.device)]
        _adamw_of_many_kernel[(len(table.owners),)](
            table.places, table.owners, table.sizes, table.firsts, rates, table.decays, shared, *betas, eps,
            PUBLISHED=dtype is not None, NARROW=_NARROW[dtype or torch.float32], ALIGNED=aligned, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _table(
    places: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> _Table:
    """Made once for tensors that stay where they are."""
    programs = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs)
    return _Table(
        torch.tensor(places, dtype=torch.int64).to(device),
        owners.to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
        (programs.cumsum(0) - programs).int().to(device),
        torch.tensor(decays, dtype=torch.float32).to(device),
    )


@functools.lru_cache(maxsize=16)
def _index(chosen: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(chosen, dtype=torch.int64).to(device)
