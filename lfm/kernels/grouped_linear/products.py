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
        out = rows.new_empty(len(rows), weights.shape[2])
        return self._multiply(rows, weights, out, cu_seqlens_m=boundaries)

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        out = left.new_empty(len(boundaries) - 1, left.shape[1], right.shape[1])
        return self._multiply(left.T, right, out, cu_seqlens_k=boundaries)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, **boundaries: Tensor) -> Tensor:
        gemm, config_class = _quack()
        # Of the tiles that were fast on an H200, those that cover the width with the least beyond it.  What its
        # autotuner would compile and time for minutes comes within 2 % of them, with the same bits.
        width = min((192, 256, 160), key=lambda width: -out.shape[-1] % width)
        config = config_class(
            tile_m=128,
            tile_n=width,
            pingpong=width < 256,
            cluster_m=2 if width == 160 else 1,
            cluster_n=1,
            is_dynamic_persistent=False,
        )
        gemm(a, b, out, config=config, **boundaries)
        return out


@functools.cache
def _quack() -> tuple[Callable[..., object], Callable[..., Any]]:
    """Its product without the autotuner, and the class of its configurations."""
    # Its compiler remarks on its own kernels' arguments whenever it compiles one.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"cutlass\.")
    interface, config = (importlib.import_module(f"quack.gemm_{part}") for part in ("interface", "config"))
    return interface.gemm_tuned.fn, config.GemmConfig
