"""Which path of an op runs: its Triton kernels, once they were seen to agree with its `reference.py`, or that."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from lfm.kernels.recording import not_recording

Backend = Literal["auto", "triton", "reference"]
"""auto: Triton on a GPU, up to fp32, where it is installed and right."""

Comparison = Callable[..., Iterator[tuple[str, Tensor, Tensor]]]
"""`comparison(device, dtype, *sizes)` runs the kernels on a small problem of these sizes, and yields what each result
is called, what it is, and what it must be."""


def working_dtype(device: torch.device) -> torch.dtype:
    """What weights and activations are in on this device where nobody says otherwise."""
    if device.type != "cuda":
        return torch.float32
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if is_old else torch.bfloat16


WITHOUT_FLOAT64 = {"mps"}
"""Types of devices."""


def widest(device: torch.device) -> torch.dtype:
    """float64, of sums and angles that fp32 is too coarse for; float32 on a device that has nothing better."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def runs_triton(x: Tensor, backend: Backend, comparison: Comparison, *sizes: int) -> bool:
    """Whether the kernels run on `x`; on "auto" a process's first call with these sizes waits for `comparison`."""
    if backend == "auto":
        on_device = x.is_cuda and x.dtype != torch.float64 and _triton_is_installed()
        return on_device and _agree(comparison, x.device, x.dtype, *sizes)
    return backend == "triton"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _agree(comparison: Comparison, device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    failure = disagreement(comparison, device, dtype, *sizes)
    if failure is not None:
        op = comparison.__module__.split(".")[-2]
        warnings.warn(
            f"{op}: the Triton kernels {failure} on {_name(device)}; this process uses plain PyTorch for it, which is "
            "several times slower",
            RuntimeWarning,
            stacklevel=4,
        )
    return failure is None


def disagreement(comparison: Comparison, *arguments: Any) -> str | None:
    """What is wrong with the kernels, or None.  Integers must be equal, fp32 to 1e-4 and less to 1e-2 of the norm."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), _own_saved_tensors(), not_recording():
            for name, got, want in comparison(*arguments):
                if not got.is_floating_point():
                    if not torch.equal(got, want):
                        return f"are wrong in {name}"
                    continue
                right = want.detach().double()
                error = float((got.detach().double() - right).norm() / right.norm())
                if not error < (1e-4 if got.dtype == torch.float32 else 1e-2):
                    return f"are off by {error:.1e} in {name}"
    except Exception as error:  # a compiler's or a driver's, of any class
        return f"fail with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _own_saved_tensors() -> AbstractContextManager[None]:
    """Whoever counts the tensors saved around a call, as activation checkpointing does, must not see a comparison's."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def draw(seed: int, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers for a comparison; the process's own generators stay as they are."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's; None for a CPU, and for an AMD GPU, whose numbers count other things."""
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_cuda else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
