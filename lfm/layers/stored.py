"""Where the tensors of a checkpoint lie in those of a layer."""

from dataclasses import dataclass, replace
from typing import Any

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Stored:
    """A global tensor in a run-time one.  A layer's `stored()` has them by global name, relative to the layer."""

    tensor: str
    """Name of the parameter or buffer that holds it."""
    index: Index = ()
    """Of its part there; empty: all of it."""
    cut: int | None = None
    """Dimension along which tensor-parallel processes share it; None: each has it whole."""
    expert: bool = False
    """Whether it belongs to one expert, and so to the processes that hold that one."""

    def within(self, prefix: str) -> "Stored":
        """The same, seen from the module whose submodule `prefix` the layer is."""
        return replace(self, tensor=f"{prefix}.{self.tensor}") if prefix else self
