"""What streaming carries from one call to the next."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

AnyState = TypeVar("AnyState", bound="State")


class State:
    """What streaming carries from one call to the next: a dataclass of tensors, and lists and dicts of tensors.  None
    is a part that a model has not.

    Dimension 0 of every tensor is the batch.  Values are replaced, never written into.
    """

    def tensors(self) -> dict[str, Tensor]:
        """By name, such as `hidden.2` for the third of a list."""
        found: dict[str, Tensor] = {}
        self._map(lambda name, tensor: found.setdefault(name, tensor))
        return found

    def map(self: AnyState, change: Callable[[Tensor], Tensor]) -> AnyState:
        """The state with `change` applied to each tensor."""
        return self._map(lambda _, tensor: change(tensor))

    def filled(self: AnyState, tensors: Mapping[str, Tensor]) -> AnyState:
        """A state like this one with these tensors, by name, in its dtypes and on its devices.

        Raises ValueError, naming the first difference, unless names and shapes are its own.
        """
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            _check_shape(name, tensors.get(name), own.get(name))
        return self._map(lambda name, tensor: tensors[name].to(tensor))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def detach(self: AnyState) -> AnyState:
        return self.map(Tensor.detach)

    @classmethod
    def stack(cls: type[AnyState], states: Sequence[Any]) -> AnyState:
        """One batch from several, in order."""
        parts = [state.tensors() for state in states]
        return states[0]._map(lambda name, _: torch.cat([tensors[name] for tensors in parts]))

    def check_like(self, expected: "State") -> None:
        """Raise ValueError, naming the first difference, unless this state has the tensors of `expected`, shape by
        shape.
        """
        if type(self) is not type(expected):
            raise ValueError(
                f"a {type(self).__name__} is the state of another model family, not {type(expected).__name__}"
            )
        own, wanted = self.tensors(), expected.tensors()
        for name in sorted(own.keys() | wanted.keys()):
            _check_shape(name, own.get(name), wanted.get(name))

    def _map(self: AnyState, change: Callable[[str, Tensor], Tensor]) -> AnyState:
        return _map_tree("", self, change)


def _check_shape(name: str, found: Tensor | None, wanted: Tensor | None) -> None:
    if found is None or wanted is None or found.shape != wanted.shape:
        raise ValueError(
            f"the state is of another model or batch: {name} is {'missing' if found is None else list(found.shape)}, "
            f"this model needs {'none' if wanted is None else list(wanted.shape)}"
        )


def _map_tree(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    dot = name and name + "."
    if value is None:
        return None
    if isinstance(value, Tensor):
        return change(name, value)
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        return type(value)(**{key: _map_tree(dot + key, getattr(value, key), change) for key in fields})  # type: ignore[operator]
    if isinstance(value, list):
        return [_map_tree(f"{dot}{i}", item, change) for i, item in enumerate(value)]
    assert isinstance(value, dict), f"{name} of a state is a {type(value).__name__}"
    return {key: _map_tree(f"{dot}{key}", item, change) for key, item in value.items()}
