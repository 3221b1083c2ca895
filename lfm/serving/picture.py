"""What an answer's state looks like, small enough to be sent while it is made."""

from typing import Any

from torch import Tensor

from lfm.inference.batcher import Batcher, Request

CELLS = 96
"""At most, of each tensor."""
_MOST_TENSORS = 64


def picture_of(batcher: Batcher, request: Request) -> dict[str, Any] | None:
    """Of a running request: `state`, a row a tensor with `cells` from -1 to 1; `experts`, each layer's shares; the
    tokens read.  None of others.
    """
    tensors = batcher.state_of(request)
    if not tensors and request not in batcher.running:
        return None
    floating = [(name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point()]
    load = batcher.load_of(request)
    return {
        "tokens": len(request.prompt) + len(request.made),
        "state": [_row(name, tensor) for name, tensor in floating[:_MOST_TENSORS]],
        "experts": [] if load is None else _shares(load),
    }


def _row(name: str, tensor: Tensor) -> dict[str, Any]:
    """Evenly spaced values of a tensor, over three times its RMS."""
    values = tensor.detach().double().flatten()  # whose squares stay finite
    rms = values.square().mean().sqrt()
    stride = max(1, -(-len(values) // CELLS))
    cells = (values[::stride] / (3 * rms).clamp(min=1e-30)).clamp(-1, 1)
    return {
        "name": name,
        "size": len(values),
        "rms": float(rms),
        "cells": [round(cell, 2) for cell in cells.cpu().tolist()],
    }


def _shares(load: Tensor) -> list[list[float]]:
    shares = load.double() / load.sum(1, keepdim=True).clamp(min=1)
    return [[round(share, 3) for share in layer] for layer in shares.cpu().tolist()]
