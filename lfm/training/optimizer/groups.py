"""Which parameters are updated alike: matrices decay, vectors do not, and `optimizer.groups` says otherwise by name."""

import dataclasses
import difflib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from lfm.errors import UserError
from lfm.training.optimizer.kind import Group, OptimizerKind


def parameter_groups(
    config: OptimizerKind,
    named: Iterable[tuple[str, Tensor]],
    *,
    multiple: Callable[[str], float] = lambda name: 1.0,
    experts: Container[str] = (),
    wide: Container[str] = (),
) -> list[Group]:
    """The groups of (name, parameter) pairs, sorted: in the same order on every process.

    `multiple`: of a parameter's name, what the model makes of the learning rate; it leaves what decays at a step as it
    is.  `experts`, `wide`: names of those whose groups say so.
    """
    members: dict[tuple[bool, bool, float, float], dict[str, Tensor]] = {}
    for name, parameter in named:
        lr_multiple, decay = 1.0, config.weight_decay if parameter.dim() > 1 else 0.0
        exception = next((group for group in config.groups if fnmatchcase(name, group.match)), None)
        if exception is not None:
            lr_multiple = exception.lr_multiple
            decay = decay if exception.weight_decay is None else exception.weight_decay
        lr_multiple, decay = lr_multiple * multiple(name), decay / multiple(name)
        members.setdefault((name in experts, name in wide, -decay, lr_multiple), {})[name] = parameter
    return [
        Group(members[key], weight_decay=-key[2], lr_multiple=key[3], is_expert=key[0], is_wide=key[1])
        for key in sorted(members)
    ]


def split_groups(groups: Iterable[Group], unit: Callable[[str], str]) -> list[Group]:
    """Each group in parts whose parameters are of one `unit`, which is given by name."""
    parts: list[Group] = []
    for group in groups:
        members: dict[str, dict[str, Tensor]] = {}
        for name, parameter in group.named.items():
            members.setdefault(unit(name), {})[name] = parameter
        parts += [dataclasses.replace(group, named=named) for named in members.values()]
    return parts


@dataclass(frozen=True)
class Found:
    """What one process found of `optimizer.groups` among its parameters."""

    matched: frozenset[str]
    names: tuple[str, ...]
    """Of parameters, as examples."""


def found_groups(config: OptimizerKind, names: Sequence[str]) -> Found:
    matched = (e.match for e in config.groups if any(fnmatchcase(name, e.match) for name in names))
    return Found(frozenset(matched), tuple(names))


def check_groups(config: OptimizerKind, found: Sequence[Found]) -> None:
    """Raises UserError for an exception that matches nothing on any process."""
    for exception in config.groups:
        if not any(exception.match in process.matched for process in found):
            names = sorted({name for process in found for name in process.names})
            near = difflib.get_close_matches(exception.match, names, n=3, cutoff=0.3) or names[:3]
            raise UserError(
                f"optimizer.groups: match={exception.match} is the name of no parameter; some are {', '.join(near)} "
                "(query, key and value, or gate and up, are one parameter; experts of a process are one too)"
            )
