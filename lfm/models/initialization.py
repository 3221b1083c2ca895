"""Initial values: every tensor draws from (seed, global name), so that no layout and no order of building matters."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lfm.errors import UserError
from lfm.models.global_names import global_views, moving_names


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every (seed, name): what one tensor draws does not depend on the others."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def initialize(model: nn.Module, seed: int, targets: dict[str, Tensor] | None = None) -> None:
    """Fill `targets` (global name -> tensor; by default the language model's own) with their initial values.

    Buffers that move are the model's own, as before the first step.

    Threads draw several tensors at once; each has its own generator, so the result does not depend on them.
    """
    views = global_views(model, lambda _, tensor: tensor) if targets is None else targets
    initial_tensor = cast(Callable[..., Tensor], model.initial_tensor)

    def fill(name: str) -> None:
        views[name].copy_(initial_tensor(name, views[name].shape, seed))

    moving = moving_names(model)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, [name for name in views if name not in moving]))
    start_moving(model)


def start_moving(model: nn.Module) -> None:
    """Buffers that training moves between steps, as before the first one."""
    for module in model.modules():
        if hasattr(module, "moving_buffers"):
            cast(Any, module).start()


AnyModel = TypeVar("AnyModel", bound=nn.Module)


def materialize(make: Callable[[], AnyModel], *, device: torch.device, dtype: torch.dtype) -> AnyModel:
    """What `make` builds, with empty parameters in `dtype` on `device`.

    Parameters that a module lists in `wide_parameters` are in fp32 at least: they are their own masters then.  Frozen
    tensors keep their own dtype: they are few, and exact.  Raises UserError, before anything is allocated, for a model
    whose tensors alone are more than all of the device's memory.
    """
    with torch.device("meta"):
        model = make()
    for module in model.modules():
        wide = getattr(module, "wide_parameters", ())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        kind, where = cast(Any, model).config.kind, "machine" if device.type == "meta" else device.type
        raise UserError(
            f"the weights of model.kind={kind} take {needed / 2**30:,.1f} GiB and this {where} has "
            f"{there / 2**30:,.1f}; make model.num_layers, its widths or model.vocab_size smaller"
        )
    return model.to_empty(device=device)
