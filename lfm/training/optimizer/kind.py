"""What a kind of optimizer is: its settings, what it keeps of a parameter, torch's optimizer over groups of them."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from lfm.config import Config, Width

Beta = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroup(Config):
    """An exception for the parameters whose names it matches."""

    match: str
    """Name of a parameter in memory, such as layers.0.attention.qkv.weight, where * stands for anything."""
    lr_multiple: float = Field(default=1.0, ge=0)
    """Factor on the learning rate, at every step."""
    weight_decay: float | None = Field(default=None, ge=0)
    """null: as without the group."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike, have one dtype, and whose gradients one set of processes sums."""

    named: Mapping[str, Tensor]
    weight_decay: float
    lr_multiple: float
    is_expert: bool
    is_wide: bool
    """Whether they are in fp32 where the others are in bf16."""


class OptimizerKind(Config, abc.ABC):
    """What all kinds have.  Each adds its `kind` and its own settings."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    lr_at_width: Width | None = None
    """hidden_size that lr is for: a model n times as wide takes 1/n of it.  null: lr is for every width."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on gains and biases."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""
    groups: tuple[ParameterGroup, ...] = ()
    """Exceptions from lr and weight_decay; the first that matches counts."""

    state_title: ClassVar[str]
    """What `--dry-run` calls its state."""
    state_keys: ClassVar[tuple[str, ...]]
    """What it keeps beside each parameter: tensors of its shape, which a checkpoint holds under these names."""
    waits_for_nothing: ClassVar[bool] = False
    """Whether its update on a GPU can be recorded in a CUDA graph, and knows how to be refused on the device."""

    def peak_lr(self, hidden_size: int) -> float:
        """Of a model of this width."""
        return self.lr * (self.lr_at_width / hidden_size if self.lr_at_width is not None else 1.0)

    @property
    def bytes_per_parameter(self) -> int:
        """Of its state, which is fp32."""
        return 4 * len(self.state_keys)

    @abc.abstractmethod
    def build(self, groups: Sequence[Group], *, fused: bool = True) -> torch.optim.Optimizer:
        """The optimizer over `groups`, whose states are `new_state`s.

        `fused`: one kernel for many parameters where it has one, which takes state beside the parameters alone.
        """

    @torch.no_grad()
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Tensor,
        scale: Tensor,
        refused: Tensor,
        working: Mapping[Tensor, Tensor],
    ) -> None:
        """Update what `build` made with the gradients times `scale`, which they may be left as.

        lr, scale, refused: tensors of one number on the parameters' device, those two in its widest dtype, refused
        bool: kinds that wait for nothing then leave all as it is; others are never given such gradients.
        working: by parameter, its copy in another dtype, which is given the new value.
        """
        # torch's fused kernels for CPUs read a tensor themselves.
        rate = lr if self.waits_for_nothing and lr.device.type == "cpu" else float(lr)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiple"]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        if self.waits_for_nothing:
            cast(Any, optimizer).found_inf = refused.float()
        optimizer.step()
        if working:
            torch._foreach_copy_([*working.values()], [*working])  # pyright: ignore[reportPrivateImportUsage]

    def first_gradient(self, state: Mapping[str, Tensor]) -> Tensor:
        """The gradient that a first update took, from the state that it left: what certificates compare."""
        raise NotImplementedError(f"{type(self).__name__} does not say what gradient an update took")

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first update, so that a fresh run can be loaded into; `step` counts updates."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, **{key: torch.zeros_like(parameter, requires_grad=False) for key in self.state_keys}}

    def _for_torch(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        return [
            {
                "params": [*group.named.values()],
                "lr_multiple": group.lr_multiple,
                "weight_decay": group.weight_decay,
                "lr": self.lr * group.lr_multiple,
            }
            for group in groups
        ]
