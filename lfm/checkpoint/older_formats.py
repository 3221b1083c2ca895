"""Manifests of older formats, as this version writes them: one pure function a format, each to the next.

Format 1 has no checksum.  Format 2 has one; the keys of a model's parts are the model's own, states of generators are
kept, and so are counts of updates of the parameters that had fewer than the others.  Format 3 knows the published
initialization alone.  A key that changes what a model computes never gets a default here: what the older version
computed is written out.
"""

from typing import Any

Tree = dict[str, Any]

_PARTS = {
    "lfm": ("attention", "moe"),
    "transformer": ("attention", "swiglu"),
    "liquidnet": ("swiglu",),
}
_MOE = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_capacity_factor", "moe_z_loss_coeff")


def migrated(tree: Tree) -> Tree:
    """A valid manifest of any format as one of the newest."""
    if tree["format"] == 1:
        tree = from_1(tree)
    if tree["format"] == 2:
        tree = from_2(tree)
    if tree["format"] == 3:
        tree = from_3(tree)
    return tree


def from_1(tree: Tree) -> Tree:
    return {**tree, "format": 2}


def from_2(tree: Tree) -> Tree:
    config = {**tree["config"], "model": nested(tree["config"]["model"])}
    if isinstance(config.get("optimizer"), dict):
        config["optimizer"] = {"kind": "adamw", **config["optimizer"]}
    # All parameters have had as many updates since: one without a gradient is given a gradient of zero.
    counters = {key: value for key, value in tree["counters"].items() if key != "late_parameters"}
    rest = {key: value for key, value in tree.items() if key not in ("rng", "checksum")}
    return {**rest, "format": 3, "config": config, "counters": counters}


def from_3(tree: Tree) -> Tree:
    model = dict(tree["config"]["model"])
    if model["kind"] in ("lfm", "transformer"):
        factors = (model.get("embedding_multiplier", 1.0), model.get("logit_multiplier", 1.0))
        # With factors the published initialization is no choice any more; how tensors were drawn is past.
        model["initialization"] = "published" if factors == (1.0, 1.0) else "unit"
        if model["initialization"] == "unit":
            model["init_method_std"] = 0.02
        model["depth_rate"] = 1.0
        model.setdefault("untie_embeddings_and_output_weights", False)
        if isinstance(model.get("attention"), dict):
            model["attention"] = {**model["attention"], "qk_norm": False}
    ffn, counters = model.get("ffn"), tree.get("counters", {})
    if isinstance(ffn, dict) and "num_moe_experts" in ffn and "num_layers" in model:
        layers = [str(layer) for layer in range(model["num_layers"])]
        idle = {layer: [0] * ffn["num_moe_experts"] for layer in layers}
        counters = {**counters, "router_idle_steps": idle, "router_uneven_steps": dict.fromkeys(layers, 0)}
    return {**tree, "format": 4, "config": {**tree["config"], "model": model}, "counters": counters}


def nested(model: Tree) -> Tree:
    """A model's config with the keys of its parts in sections of their own, and factors that it had not."""
    model = dict(model)
    if model["kind"] in ("lfm", "transformer"):
        model |= {"embedding_multiplier": 1.0, "logit_multiplier": 1.0}

    def taken(*keys: str) -> Tree:
        return {key: model.pop(key) for key in keys if key in model}

    for part in _PARTS.get(model["kind"], ()):
        if part == "attention":
            model["attention"] = taken("num_attention_heads", "num_query_groups", "rotary_base")
            if "attention_backend" in model:
                model["attention"]["backend"] = model.pop("attention_backend")
        elif part == "moe":
            balance = {
                "kind": "loss",
                "coeff": model.pop("moe_aux_loss_coeff", 0.01),
                "scope": model.pop("moe_aux_loss_scope", "sequence"),
            }
            model["ffn"] = {"kind": "moe", **taken(*_MOE), "balance": balance}
        else:
            model["ffn"] = {"kind": "swiglu", **taken("ffn_hidden_size")}
    if isinstance(model.get("liquid"), dict):
        model["liquid"] = {"kind": "reservoir", **model["liquid"]}
    return model
