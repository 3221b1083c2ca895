"""Global names: the layout-free name of every weight, whatever the run-time storage fuses or splits.

`layers.3.moe.experts.2.gate.weight` is one tensor in a checkpoint, and a slice of a fused parameter at run time.
Initialisation, checkpoints and comparisons between layouts all go through these names.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

Index = tuple[Any, ...]


def global_index(model: nn.Module) -> dict[str, tuple[str, Index]]:
    """Global name -> (run-time name of the parameter or buffer, index of the part), in parameter order."""
    fused: dict[str, list[tuple[str, Index]]] = {}
    for prefix, module in model.named_modules():
        parts = cast(Any, module).fused_parameters() if hasattr(module, "fused_parameters") else {}
        dot = prefix + "." if prefix else ""
        for name, (tensor, index) in parts.items():
            fused.setdefault(dot + tensor, []).append((dot + name, index))
    names: dict[str, tuple[str, Index]] = {}
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        for global_name, index in fused.get(name, [(name, ())]):
            names[global_name] = (name, index)
    return names


def global_views(model: nn.Module, pick: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Views, by global name, of the tensors that `pick(run-time name, parameter or buffer)` returns.

    `pick` gives a tensor of the parameter's shape (the parameter itself, its fp32 master, a moment, a gradient), or
    None to leave it out.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    picked = {name: pick(name, tensor) for name, tensor in tensors.items()}
    views = {}
    for global_name, (name, index) in global_index(model).items():
        tensor = picked[name]
        if tensor is not None:
            views[global_name] = tensor.detach()[index] if index else tensor.detach()
    return views
