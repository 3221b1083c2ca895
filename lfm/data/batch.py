"""Rows on the host, as readers hand them to engines."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from lfm.layers.documents import Documents, Rows


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows of one length.  A model takes them as `Rows`."""

    ids: Tensor
    """int64 `[R, T]`."""
    lengths: Sequence[Sequence[int]]
    """Of the documents in each row, in order; each row's sum to T."""
    label_mask: Tensor | None = None
    """bool `[R, T]`: may the id at a position be a label?  None: every one may."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further columns by name, such as a class or a reference's log-likelihood; their first dimension is R."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Batch":
        mask = self.label_mask[rows] if self.label_mask is not None else None
        return Batch(self.ids[rows], self.lengths[rows], mask, {name: x[rows] for name, x in self.extras.items()})

    def filled(self, rows: int) -> "Batch":
        """With so many more rows, none of which has a label: documents of one token."""
        T = self.ids.shape[1]
        ids, lengths = torch.cat([self.ids, self.ids[:1].expand(rows, T)]), [*self.lengths, *[[1] * T] * rows]
        mask = self.label_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_zeros(rows, T)])
        extras = {n: torch.cat([x, x[:1].expand(rows, *x.shape[1:])]) for n, x in self.extras.items()}
        return Batch(ids, lengths, mask, extras)

    @functools.cached_property
    def documents(self) -> Documents:
        """On the host."""
        return Documents.from_lengths(self.lengths, "cpu", self.label_mask)

    def prepared(self) -> "Batch":
        """The same, with what the host makes of it made already: whoever reads ahead has the time."""
        assert self.documents is not None and self._whole_digest is not None
        return self

    def to(self, device: torch.device | str) -> Rows:
        """On `device`, with its documents."""
        documents = self.documents.to(device)
        extras = {name: column.to(device, non_blocking=True) for name, column in self.extras.items()}
        return Rows(self.ids.to(device, non_blocking=True), documents, extras)

    def digest(self, first: int = 0) -> int:
        """64 bits of all that is in these rows, which are `first`, `first` + 1, ... of an optimizer step.

        Digests of parts of a step add up to the whole step's modulo 2**64.  A row all of whose ids may be labels has
        the digest of one without a mask.
        """
        return self._whole_digest if first == 0 else self._digest(first)

    @functools.cached_property
    def _whole_digest(self) -> int:
        return self._digest(0)

    def _digest(self, first: int) -> int:
        assert self.ids.dtype == torch.int64 and self.ids.device.type == "cpu"
        total = 0
        for i, lengths in enumerate(self.lengths):
            digest = xxhash.xxh3_64(np.ascontiguousarray(self.ids[i].numpy()).data, seed=first + i)
            digest.update(np.asarray(lengths, np.int64).data)
            if self.label_mask is not None and not self.label_mask[i].all():
                digest.update(b"label_mask")
                digest.update(np.packbits(self.label_mask[i].numpy()).data)
            for name, column in sorted(self.extras.items()):
                digest.update(f"{name} {column.dtype}".encode())
                digest.update(np.ascontiguousarray(column[i].numpy()).data)
            total += digest.intdigest()
        return total % 2**64


def joined(parts: Sequence[Batch], *, order: np.ndarray) -> Batch:
    """The rows of all parts, which have the same columns, as one batch: row i is `order[i]` of them end to end."""
    first, places = parts[0], torch.from_numpy(order)
    lengths = [row for part in parts for row in part.lengths]
    mask = None
    if first.label_mask is not None:
        mask = torch.cat([part.label_mask for part in parts if part.label_mask is not None])[places]
    extras = {name: torch.cat([part.extras[name] for part in parts])[places] for name in first.extras}
    return Batch(torch.cat([part.ids for part in parts])[places], [lengths[i] for i in order], mask, extras)
