"""The definition of `add_rows_`."""

from torch import Tensor


def add_rows_reference_(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    total.index_add_(0, ids, rows.to(total.dtype))
