"""The definitions of the moves to the experts and back, in plain PyTorch; the gradients of each are beside it."""

import torch
from torch import Tensor


def sorted_places_reference(keys: Tensor) -> Tensor:
    order = keys.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def dispatch_reference(x: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    copies = x.unsqueeze(1).expand(*place.shape, -1)
    rows = x.new_empty(place.numel(), x.shape[1])
    rows[place] = copies if weights is None else copies * weights.unsqueeze(-1).to(x.dtype)
    return rows


def combine_reference(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    chosen = rows[place]  # [n, k, D]
    return (chosen if weights is None else chosen * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


def combine_backward_reference(grad: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad_weights = (rows[place] * grad.unsqueeze(1)).sum(-1).to(weights.dtype)
    return dispatch_reference(grad, place, weights), grad_weights
