"""The packages of flash-attn as one function of packed documents: flash-attn 4 and, where that is not, flash-attn 2."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lfm.errors import UserError
from lfm.layers.documents import Documents


@dataclass(frozen=True)
class FlashPackage:
    """One of the packages, and what its kernels do forwards and backwards."""

    name: str
    """As pip knows it."""
    module: str
    capabilities: tuple[int, ...]
    """Major compute capabilities."""
    largest_head_size: int

    @property
    def installed(self) -> bool:
        return _is_installed(self.name)

    def lack(self, capability: tuple[int, int] | None, dtype: torch.dtype, head_size: int) -> str | None:
        """Why it cannot attend such heads, as words after its name.  capability: of the GPU; None: no CUDA."""
        if capability is None or capability[0] not in self.capabilities:
            wanted = ", ".join(f"{major}.x" for major in self.capabilities)
            found = "one without CUDA" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
            return f"needs a GPU of compute capability {wanted}, not {found}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        if head_size % 8 or head_size > self.largest_head_size:
            return f"takes head sizes that 8 divides up to {self.largest_head_size}, not {head_size}"
        return None


FLASH_ATTN_4 = FlashPackage("flash-attn-4", "flash_attn.cute", (9, 10, 11), 128)
FLASH_ATTN_2 = FlashPackage("flash-attn", "flash_attn", (8, 9, 10, 11, 12), 256)
PACKAGES = (FLASH_ATTN_4, FLASH_ATTN_2)
"""The faster first."""


def require_package() -> None:
    """Raise UserError unless one of the packages is installed."""
    if not any(package.installed for package in PACKAGES):
        raise UserError(
            "attention.backend=flash needs the package flash-attn-4, which is not installed here: "
            "pip install 'flash-attn-4[cu13]==4.0.0b36', or choose attention.backend=auto"
        )


def flash_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    documents: Documents,
    package: FlashPackage,
) -> Float[Tensor, "B H T K"]:
    """Causal attention within documents; the same bits every time, also of the gradients.

    Nothing is copied where memory is in the order B, T, heads, K, as `rotated_heads` leaves it; the result lies so too.
    The kernel sees all rows as one sequence of B T positions, so it is the same with and without boundaries in a row.
    """
    B, H, T, K = q.shape
    result = _varlen_function(package)(
        *(part.transpose(1, 2).reshape(B * T, -1, K) for part in (q, k, v)),
        cu_seqlens_q=documents.boundaries,
        cu_seqlens_k=documents.boundaries,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        causal=True,
        deterministic=True,
    )
    y = result[0] if isinstance(result, tuple) else result  # flash-attn 4 also hands out the log of the denominators
    return y.view(B, T, H, K).transpose(1, 2)


@functools.cache
def _is_installed(name: str) -> bool:
    # flash-attn 2 has a folder flash_attn/cute too, so only the package's name tells them apart.
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _varlen_function(package: FlashPackage) -> Callable[..., Any]:
    # Flash-attn 4's compiler remarks on its own kernels' arguments whenever it compiles one.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"cutlass\.")
    return importlib.import_module(package.module).flash_attn_varlen_func
