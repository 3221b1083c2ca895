"""The grouped products, by quack-kernels, by PyTorch and a group at a time.  The first two take bf16 and widths that 8
divides, and leave what no group covers unwritten."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm.kernels.accumulation import accumulate_
from lfm.kernels.linear import add_product_


class Products(Protocol):
    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        """`[m, K]`, `[E, K, N]` -> `[m, N]`: rows of group e times `weights[e]`."""
        ...

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        """`[m, M]`, `[m, N]` -> `[E, M, N]`: of group e, `left^T right`; zero without rows."""
        ...

    def add_by_rows_(self, total: Tensor, left: Tensor, right: Tensor, boundaries: Tensor, add: bool) -> None:
        """The same into `total`, in its dtype, or added to it where `add`."""
        ...


class Plain:
    """In any dtype and of any widths; rows behind the last group come out as 0.  Reads the boundaries back once."""

    def __init__(self, boundaries: Tensor) -> None:
        self.sizes: list[int] = boundaries.diff().tolist()

    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        *groups, behind = self._split(rows)
        outputs = [group @ weight for group, weight in zip(groups, weights, strict=True)]
        return torch.cat([*outputs, behind.new_zeros(len(behind), weights.shape[2])])

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        out = left.new_empty(len(self.sizes), left.shape[1], right.shape[1])
        self.add_by_rows_(out, left, right, boundaries, False)
        return out

    def add_by_rows_(self, total: Tensor, left: Tensor, right: Tensor, boundaries: Tensor, add: bool) -> None:
        for of_group, a, b in zip(total, self._split(left), self._split(right), strict=False):  # none is behind
            add_product_(of_group, a, b, add)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([*self.sizes, len(rows) - sum(self.sizes)])


class Torch:
    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        return F.grouped_mm(rows, weights, offs=boundaries[1:])

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=boundaries[1:])

    def add_by_rows_(self, total: Tensor, left: Tensor, right: Tensor, boundaries: Tensor, add: bool) -> None:
        _add_rounded_(self, total, left, right, boundaries, add)


class Quack:
    """Tri Dao et al., `quack-kernels`, which flash-attn 4 depends on: compiled at first use and kept on disk."""

    installed_version: str | None
    try:
        installed_version = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        installed_version = None

    def __init__(self, *, adds: bool = True) -> None:
        """`adds`: whether its products may add to a wider sum as they are stored."""
        self.adds = adds

    def by_weights(self, rows: Tensor, weights: Tensor, boundaries: Tensor) -> Tensor:
        gemm, config = _quack()
        out = rows.new_empty(len(rows), weights.shape[2])
        gemm(rows, weights, out, cu_seqlens_m=boundaries, config=config(**_tile(weights.shape[2])))
        return out

    def by_rows(self, left: Tensor, right: Tensor, boundaries: Tensor) -> Tensor:
        out = left.new_empty(len(boundaries) - 1, left.shape[1], right.shape[1])
        self.add_by_rows_(out, left, right, boundaries, False)
        return out

    def add_by_rows_(self, total: Tensor, left: Tensor, right: Tensor, boundaries: Tensor, add: bool) -> None:
        if total.dtype != left.dtype and (not self.adds or total.data_ptr() % _ALIGNED):
            return _add_rounded_(self, total, left, right, boundaries, add)
        gemm, config = _quack()
        # Either side may be the one that a tile is wide in.
        swap = total.shape[2] % _WIDTH != 0 and total.shape[1] % _WIDTH == 0
        tile = _tile(total.shape[1] if swap else total.shape[2])
        # It adds as it stores, without reading: each element is of one tile, so the bits repeat.
        how = {"cu_seqlens_k": boundaries, "add_to_output": add, "config": config(**tile, swap_ab=swap)}
        gemm(left.T, right, total, **how)


def _add_rounded_(
    products: Products, total: Tensor, left: Tensor, right: Tensor, boundaries: Tensor, add: bool
) -> None:
    accumulate_(total, products.by_rows(left, right, boundaries), add=add)


_WIDTH = 192
_ALIGNED = 16
"""Bytes, as the device's copies of tiles demand."""


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
