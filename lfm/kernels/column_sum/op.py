"""`column_sum`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.column_sum.reference import column_sum_reference


def column_sum(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`[n, D]` -> `[D]`, summed over the rows: in at least fp32, always in the same order, rounded to x's dtype once.

    For use in a backward: the sum itself has no gradient.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; a column sum needs [n, D]")
    if x.shape[1] == 0 or not runs_triton(x, backend, _comparison, x.shape[1]):
        return column_sum_reference(x)
    from lfm.kernels.column_sum.kernel import column_sum_kernel

    return column_sum_kernel(x if x.stride(1) == 1 else x.contiguous())


def _comparison(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    for num_rows in (40, 300):  # one share and several
        x = draw(num_rows, num_rows, D, device=device, dtype=dtype)
        yield f"the sum of {num_rows} rows", column_sum(x, backend="triton"), column_sum_reference(x.double())
