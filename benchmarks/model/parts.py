"""Which part of a step an operation belongs to: ranges that a profiler sees, around the model's own functions.

Forward passes are marked while `marked` holds, and cost nothing outside it.  Backward passes need no marks: autograd's
nodes carry the numbers of the operations that made them.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

PREFIX = "lfm: "
STEP, DATA_WAIT = PREFIX + "step", PREFIX + "data wait"

COMPUTE = (
    *("attention", "projections", "router", "permutation", "experts", "feed-forward", "liquid", "norms", "embedding"),
    *("head", "accumulation", "weight gradients", "optimizer", "other"),
)
"""Kernels by what they compute.  Accumulation: of gradients, where a backward pass hands them over; weight gradients:
those that a pipeline's stages put off; other: losses, copies and all that no range holds."""
COMMUNICATION = ("exchange", "collectives", "bubble")
"""Where nothing computes.  Exchange: all-to-all; bubble: sends and receives, which wait for other stages."""
IDLE = ("data wait", "host gaps")
"""Where no kernel runs."""
PARTS = (*COMPUTE, *COMMUNICATION, *IDLE)

FUNCTIONS = (
    ("lfm.layers.attention", "Attention.forward", "attention"),
    ("lfm.layers.liquid", "Liquid.forward", "liquid"),
    ("lfm.layers.diagonal_liquid", "DiagonalLiquid.forward", "liquid"),
    ("lfm.models.laerc", "Reservoir.forward", "liquid"),
    ("lfm.models.liquidlm", "PhaseReservoir.forward", "liquid"),
    ("lfm.layers.moe", "MoE.forward", "experts"),
    ("lfm.layers.moe", "router_logits", "router"),
    ("lfm.layers.moe", "route", "router"),
    ("lfm.layers.moe", "sampled", "router"),
    ("lfm.models.decoder", "router_losses", "router"),
    ("lfm.models.losses", "observe", "router"),
    ("lfm.layers.moe", "sorted_places", "permutation"),
    ("lfm.layers.moe", "dispatch", "permutation"),
    ("lfm.layers.moe", "combine", "permutation"),
    ("lfm.layers.mlp", "SwiGLU.forward", "feed-forward"),
    ("lfm.models.laerc", "MLP.forward", "feed-forward"),
    ("lfm.layers.norm", "RMSNorm.add_norm", "norms"),
    ("lfm.models.decoder", "Decoder.embed", "embedding"),
    ("lfm.layers.head", "Head.logits", "head"),
    ("lfm.layers.head", "Head.cross_entropy", "head"),
    ("lfm.layers.head", "Head.token_losses", "head"),
)
"""Module, function as the module's callers find it, part; an inner range counts, not the one around it."""
IN_PARALLEL = (
    ("lfm.parallel.later", "LaterProducts.run", "weight gradients"),
    ("lfm.parallel.dispatch", "sorted_places", "permutation"),
    ("lfm.parallel.dispatch", "dispatch", "permutation"),
    ("lfm.parallel.dispatch", "combine", "permutation"),
)
"""As FUNCTIONS, where the parallel engine runs."""


@contextmanager
def marked(models: list[nn.Module], *, parallel: bool) -> Iterator[None]:
    """Within it, the forward passes of `models` and whatever they call are in ranges of their parts."""
    from lfm.layers.attention import Attention

    with ExitStack() as stack:
        for module, path, part in (*FUNCTIONS, *(IN_PARALLEL if parallel else ())):
            stack.enter_context(_wrapped(importlib.import_module(module), path, part))
        linears = [
            linear
            for model in models
            for module in model.modules()
            if isinstance(module, Attention)
            for linear in module.children()
        ]
        for linear in linears:
            stack.enter_context(_hooked(linear, "projections"))
        yield


@contextmanager
def _wrapped(owner: Any, path: str, part: str) -> Iterator[None]:
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    setattr(owner, name, in_range)
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextmanager
def _hooked(module: nn.Module, part: str) -> Iterator[None]:
    """Ranges around the calls of one module, whose class others use too."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(PREFIX + part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
