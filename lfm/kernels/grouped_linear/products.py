"""The two grouped products, by quack-kernels and by PyTorch.  Both take bf16 and widths that 8 divides, and leave what
no group covers unwritten."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor


class Products(Protocol):
    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        """`[m, K]`, `[E, K, N]` -> `[m, N]`: rows of group e times `weights[e]`."""
        ...

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        """`[m, M]`, `[m, N]` -> `[E, M, N]`: of group e, `left^T right`; zero without rows."""
        ...


class Torch:
    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        return F.grouped_mm(rows, weights, offs=boundaries[1:])

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=boundaries[1:])


class Quack:
    """Tri Dao et al., `quack-kernels`, which flash-attn 4 depends on: compiled at first use and kept on disk."""

    installed_version: str | None
    try:
        installed_version = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        installed_version = None

    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        gemm, config = _quack()
        out = rows.new_empty(len(rows), weights.shape[2])
        gemm(rows, weights, out, cu_seqlens_m=boundaries, config=config(**_tile(weights.shape[2])))
        return out

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        gemm, config = _quack()
        out = left.new_empty(len(boundaries) - 1, left.shape[1], right.shape[1])
        # Either side may be the one that a tile is wide in.
        swap = out.shape[2] % _WIDTH != 0 and out.shape[1] % _WIDTH == 0
        tile = _tile(out.shape[1] if swap else out.shape[2])
        gemm(left.T, right, out, cu_seqlens_k=boundaries, config=config(**tile, swap_ab=swap))
        return out


_WIDTH = 192


def _tile(num_columns: int) -> dict[str, Any]:
    """What was fast on an H200, with any of the widths; quack's autotuner, which takes minutes to compile and time its
    choices, found nothing more than 3 % better, and all have the same bits."""
    divides = num_columns % _WIDTH == 0
    width = _WIDTH if divides else 256
    pairs = not divides and -(-num_columns // width) % 2 == 0
    return {
        "tile_m": 128,
        "tile_n": width,
        "pingpong": divides,
        "cluster_m": 1,
        "cluster_n": 2 if pairs else 1,
        "is_dynamic_persistent": False,
    }


@functools.cache
def _quack() -> tuple[Callable[..., object], Callable[..., Any]]:
    """Its product without the autotuner, and the class of its configurations."""
    # Its compiler remarks on its own kernels' arguments whenever it compiles one.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"cutlass\.")
    interface, config = (importlib.import_module(f"quack.gemm_{part}") for part in ("interface", "config"))
    return interface.gemm_tuned.fn, config.GemmConfig
