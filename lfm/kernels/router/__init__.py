"""A router's logits and its choice of experts, each in one pass."""

from lfm.kernels.router.op import Choice, choose_experts, router_logits

__all__ = ["Choice", "choose_experts", "router_logits"]
