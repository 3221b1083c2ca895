"""Which path of an op runs: its Triton kernels or the plain PyTorch of its `reference.py`."""

import functools
import importlib.util
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
"""auto: Triton on a GPU, up to fp32, where it is installed."""


def runs_triton(x: Tensor, backend: Backend) -> bool:
    if backend == "auto":
        return x.is_cuda and x.dtype != torch.float64 and _triton_is_installed()
    return backend == "triton"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
