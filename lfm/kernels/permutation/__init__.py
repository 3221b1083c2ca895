"""Rows to their experts and back: the moves around a mixture of experts' matrix products."""

from lfm.kernels.permutation.op import combine, dispatch, sorted_places

__all__ = ["combine", "dispatch", "sorted_places"]
