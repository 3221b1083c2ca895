"""Global names: the layout-free name of every weight, whatever the run-time storage fuses or splits.

`layers.3.moe.experts.2.gate.weight` is one tensor in a checkpoint, and a slice of a fused parameter at run time.
Initialisation, checkpoints and comparisons between layouts all go through these names.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from lfm.layers.stored import Stored


def stored(model: nn.Module, *, must_declare: bool = False) -> dict[str, Stored]:
    """Where every global tensor lies, by global name, in the order of parameters, then buffers.

    A tensor that no layer's `stored()` names is whole and has its run-time name.  With `must_declare` there is none: a
    process of several would take its part of one for the whole.
    """
    declared: dict[str, list[tuple[str, Stored]]] = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "stored"):
            for name, where in cast(Any, module).stored().items():
                where = where.within(prefix)
                declared.setdefault(where.tensor, []).append((f"{prefix}.{name}" if prefix else name, where))
    found: dict[str, Stored] = {}
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        assert not must_declare or name in declared, f"{name}: no layer's stored() says how tensor parallelism cuts it"
        found |= declared.get(name, [(name, Stored(name))])
    return found


def moving_names(model: nn.Module) -> set[str]:
    """Of the buffers that training moves between steps: those that their modules list in `moving_buffers`."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in getattr(module, "moving_buffers", ())
    }


def global_views(model: nn.Module, pick: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Views, by global name, of the tensors that `pick(run-time name, parameter or buffer)` returns.

    `pick` gives a tensor of the parameter's shape (the parameter itself, its fp32 master, a moment, a gradient), or
    None to leave it out.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    picked = {name: pick(name, tensor) for name, tensor in tensors.items()}
    views = {}
    for global_name, where in stored(model).items():
        tensor = picked[where.tensor]
        if tensor is not None:
            views[global_name] = tensor.detach()[where.index] if where.index else tensor.detach()
    return views
