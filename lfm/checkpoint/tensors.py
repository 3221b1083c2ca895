"""The tensors of a checkpoint: any process asks for any slices of any of them, and knows no model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from lfm.checkpoint import stored_tensors
from lfm.checkpoint.manifest import way_out
from lfm.errors import NonFiniteError, UserError


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of `tensors` (of a DTensor, this rank's shard) that holds a NaN or an infinity; one wait for a GPU."""
    local = {key: t.to_local() if isinstance(t, DTensor) else t for key, t in tensors.items()}
    floating = {key: t for key, t in local.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return None
    # Largest and smallest show both, and unlike a sum of large numbers are infinite only where an element is.
    ends = [torch.stack(torch.aminmax(tensor)).float() for tensor in floating.values()]
    finite = torch.stack([end.to(ends[0].device) for end in ends]).isfinite().all(1).tolist()
    return next((key for key, good in zip(floating, finite, strict=True) if not good), None)


_HASHED = (torch.float32, torch.bool, torch.int32)
"""Dtypes in which frozen tensors are stored: one that was asked for in another cannot be compared with its hash."""


def load_tensors(
    checkpoint: Path, manifest: dict[str, Any], targets: Mapping[str, Tensor], *, may_lack: str | None = None
) -> list[str]:
    """Fill `targets` (key -> tensor, any dtype and device) in place; of a DTensor, this rank's shard.

    Of a kind that the checkpoint `may_lack`, those that it lacks are left alone: their keys are returned.
    Not collective: every rank may ask for other keys.  Whole frozen tensors are checked against their hashes.  Raises
    NonFiniteError for a NaN or an infinity, whose consequences a resumed run would take for those of its data.
    """
    metadata = stored_tensors.read_metadata(checkpoint, manifest["files"])
    lacking = []
    if may_lack is not None:
        there = metadata.state_dict_metadata
        lacking = [key for key in targets if key.startswith(f"{may_lack}.") and key not in there]
        targets = {key: target for key, target in targets.items() if key not in lacking}
    stored_tensors.load(checkpoint, metadata, targets)
    for name, expected in manifest["frozen"].items():
        target = targets.get(name)
        if target is None or isinstance(target, DTensor) or target.dtype not in _HASHED:
            continue
        if tensor_hash(target) != expected:
            raise UserError(f"frozen tensor {name} of {checkpoint} does not match its hash; {way_out(checkpoint)}")
    bad = not_finite(targets)
    if bad is not None:
        raise NonFiniteError(f"checkpoint {checkpoint}: {bad} is not finite; use an earlier checkpoint")
    return lacking


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-64 of the values of a whole tensor."""
    return xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().numpy().tobytes())
