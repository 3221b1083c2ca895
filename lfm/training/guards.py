"""Guards move modules between updates: by what training measured, and never by a gradient."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Masters(Protocol):
    """The fp32 masters of this process's parameters."""

    def master_of(self, parameter: Tensor) -> Tensor:
        """In the parameter's run-time shape.  Collective."""
        ...

    def scale_master(self, parameter: Tensor, factors: Tensor) -> None:
        """Multiply what this process keeps of it: a factor for each index of the first dimension."""
        ...


class Guard(Protocol):
    """Owned by an engine, alike on all processes whatever layers they hold."""

    def after_backward(self, measured: Mapping[str, Mapping[int, Any]]) -> None:
        """Takes what a whole optimizer step measured, over all processes, by name and layer."""
        ...

    def after_update(self, update: int, masters: Masters) -> bool:
        """Called after the update of this number, counted from 1; whether it changed a master."""
        ...

    def record(self) -> dict[str, Any]:
        """What records of a step hold of it, after the update."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, among the values of others."""
        ...
