"""AdamW with its parameter groups, and the moments laid out for checkpoints."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from lfm.config import Config
from lfm.errors import UserError

Beta = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroup(Config):
    """An exception for the parameters whose names it matches."""

    match: str
    """Name of a parameter, such as layers.0.gate.weight, where * stands for anything."""
    lr_multiple: float = Field(default=1.0, ge=0)
    """Factor on the learning rate, at every step."""
    weight_decay: float | None = Field(default=None, ge=0)
    """null: as without the group."""


class OptimizerConfig(Config):
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment's running means."""
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on gains and biases."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""
    groups: tuple[ParameterGroup, ...] = ()
    """Exceptions from lr and weight_decay; the first that matches counts."""


def adamw(config: OptimizerConfig, parameters: Iterable[tuple[str, Tensor]]) -> torch.optim.AdamW:
    """Fused AdamW over (name, master) pairs, with its moments made at once, so that a fresh run can be loaded into.

    Matrices decay; vectors (gains and biases) do not; `config.groups` says otherwise by name.  Each group's
    `lr_multiple` is its factor on whatever learning rate a step has.  Loshchilov & Hutter 2019, arXiv 1711.05101.
    Raises UserError for a group that matches nothing.
    """
    parameters = list(parameters)
    members: dict[tuple[float, float], list[Tensor]] = {}
    matched = set()
    for name, parameter in parameters:
        group = next((group for group in config.groups if fnmatchcase(name, group.match)), None)
        lr_multiple, decay = 1.0, config.weight_decay if parameter.dim() > 1 else 0.0
        if group is not None:
            matched.add(group.match)
            lr_multiple = group.lr_multiple
            decay = decay if group.weight_decay is None else group.weight_decay
        members.setdefault((lr_multiple, decay), []).append(parameter)
    for group in config.groups:
        if group.match not in matched and not any(fnmatchcase(name, group.match) for name, _ in parameters):
            raise UserError(
                f"optimizer.groups: match={group.match} is the name of no parameter; the first is {parameters[0][0]}"
            )
    groups = [
        {"params": params, "lr_multiple": lr_multiple, "weight_decay": decay, "lr": config.lr * lr_multiple}
        for (lr_multiple, decay), params in members.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for _, p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer
