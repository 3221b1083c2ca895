"""A router's logits and its choice of experts, each in one pass."""

from lfm.kernels.router.op import Choice, RowMeans, choose_experts, router_logits, row_means

__all__ = ["Choice", "RowMeans", "choose_experts", "router_logits", "row_means"]
