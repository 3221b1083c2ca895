"""Model configs in tests: the keys of a model's parts beside those of the model."""

from typing import Any

_SECTIONS = {
    "attention": ("num_attention_heads", "num_query_groups", "rotary_base", "qk_norm"),
    "ffn": (
        *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_capacity_factor", "moe_z_loss_coeff"),
        *("balance", "ffn_hidden_size"),
    ),
}


def nested(**keys: Any) -> dict[str, Any]:
    """`num_attention_heads` and the like in the section that has them."""
    tree = dict(keys)
    for section, names in _SECTIONS.items():
        inner = {name: tree.pop(name) for name in names if name in tree}
        if inner:
            kind = {"kind": "swiglu"} if "ffn_hidden_size" in inner else {}
            tree[section] = {**kind, **inner}
    return tree
