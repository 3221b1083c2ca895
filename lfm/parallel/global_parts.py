"""Where a process's tensors lie in those of a checkpoint, under one layout."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lfm.layers.stored import Index
from lfm.models.global_names import stored
from lfm.parallel.groups import Groups


@dataclass(frozen=True)
class GlobalPart:
    """A global tensor, or this process's slice of it, in a run-time tensor."""

    name: str
    index: Index
    cut: int | None
    """Dimension along which the tensor-parallel processes of this layout share it."""
    expert: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Its view in the run-time tensor, or in one laid out alike."""
        return tensor[self.index] if self.index else tensor

    def as_global(self, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The same as a DTensor over the tensor-parallel `group`, where that shares it."""
        local = self.of(tensor)
        if self.cut is None:
            return local
        mesh = DeviceMesh.from_group(group, "cpu", mesh=dist.get_process_group_ranks(group))
        return DTensor.from_local(local, mesh, [Shard(self.cut)], run_check=False)


def global_parts(pieces: Iterable[nn.Module], groups: Groups) -> dict[str, list[GlobalPart]]:
    """By run-time name of a parameter or buffer.  Raises AssertionError, where tensors are cut, for one undeclared."""
    is_cut, found = groups.layout.tensor > 1, {}
    for piece in pieces:
        for name, where in stored(piece, must_declare=is_cut).items():
            part = GlobalPart(name, where.index, where.cut if is_cut else None, where.expert)
            found.setdefault(where.tensor, []).append(part)
    return found


def copy_own_slice(target: Tensor, whole: Tensor) -> None:
    """Fill `target`, a tensor or this process's slice of one, from the whole."""
    if isinstance(target, DTensor):
        shard, mesh = target.placements[0], target.device_mesh
        assert isinstance(shard, Shard)
        target, whole = target.to_local(), whole.chunk(mesh.size(), shard.dim)[mesh.get_local_rank()]
    target.copy_(whole)
