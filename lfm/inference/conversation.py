"""A conversation: one sequence that goes on, whose state can be kept in a file."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.errors import UserError
from lfm.files import read_file, shown, write_durably
from lfm.inference.sampling import SamplingConfig, choose, prefill
from lfm.models.language_model import LanguageModel


class Conversation:
    """One sequence that goes on: text is read into the model's state, and replies are sampled from it.

    Nothing is read twice: the state is all that is kept, and in families without attention it does not grow.
    """

    def __init__(self, model: LanguageModel, sampling: SamplingConfig, *, end_of_document: int | None) -> None:
        self.model, self.sampling, self.end_of_document = model, sampling, end_of_document
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        self.state: Any = None
        self.hidden: Tensor | None = None
        """`[1, D]`, of the last token read; None before the first."""
        self.num_tokens = 0

    def read(self, ids: Sequence[int]) -> None:
        """Take `ids` into the state.  Raises UserError where the context has no room for them, and reads none."""
        limit = self.model.config.context_limit
        if limit is not None and self.num_tokens + len(ids) >= limit:
            raise UserError(
                f"{self.num_tokens} + {len(ids)} tokens leave no room in the context of {limit}; "
                "start anew, or give less"
            )
        if ids:
            self.hidden, self.state = prefill(self.model, ids, self.state)
            self.num_tokens += len(ids)

    def reply(self) -> Iterator[int]:
        """Sampled ids, each read into the state as it is given, until the end of a document, which is not read."""
        if self.hidden is None:
            raise UserError("there is nothing to reply to; give some text first")
        limit = self.model.config.context_limit
        for _ in range(self.sampling.max_new_tokens):
            if limit is not None and self.num_tokens + 1 >= limit:
                return
            token = choose(self.model.logits(self.hidden)[0].float().cpu(), self.sampling, self.generator)
            if token == self.end_of_document:
                return
            self.read([token])
            yield token

    def save(self, path: Path, *, checkpoint: str) -> None:
        """Write the state to a file; `checkpoint` identifies the weights that it belongs to."""
        if self.hidden is None:
            return
        content = {
            "checkpoint": checkpoint,
            "num_tokens": self.num_tokens,
            "hidden": self.hidden.cpu(),
            "state": {name: tensor.cpu() for name, tensor in self.state.tensors().items()},
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        saved = buffer.getvalue()
        write_durably(path, _STATE_HEADER + hashlib.sha256(saved).hexdigest().encode() + b"\n" + saved)

    def load(self, path: Path, *, checkpoint: str) -> None:
        """Go on from a saved state.  Raises UserError for a file that is none, is damaged, or is of other weights.

        Tensors must have the names, shapes and kinds of number of the model's own state, and finite values.
        """
        empty = self.model.empty_state(1)
        if empty is None or self.model.config.context_limit is not None:
            raise UserError(f"the state of {self.model.config.kind} grows with its text and is not kept in files")
        other = "give another file, or one that does not exist"
        data = read_file(path)
        if data.startswith(b"PK"):
            raise UserError(f"{shown(path)} was saved without a checksum, by an earlier version; {other}")
        if not data.startswith(_STATE_HEADER):
            raise UserError(f"{shown(path)} is not a saved state; {other}")
        found, _, saved = data.removeprefix(_STATE_HEADER).partition(b"\n")
        if found != hashlib.sha256(saved).hexdigest().encode():
            raise UserError(f"the state {shown(path)} is damaged: its checksum does not match its contents; {other}")
        try:
            with zipfile.ZipFile(io.BytesIO(saved)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > len(saved):
                    raise ValueError  # compressed, as no saved state is: it may fill the memory
            content = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            saved_by, num_tokens, hidden = content["checkpoint"], content["num_tokens"], content["hidden"]
            tensors = content["state"]
            if (
                type(num_tokens) is not int
                or num_tokens < 1
                or not all(isinstance(name, str) for name in tensors.keys())
            ):
                raise ValueError
        except Exception:  # whatever torch makes of a file that is something else
            raise UserError(f"{shown(path)} is not a saved state; {other}") from None
        if saved_by != checkpoint:
            raise UserError(f"the state {path} is of another model ({saved_by}, not {checkpoint}); give another file")
        try:
            _check_tensors(tensors, empty.tensors())
            _check_tensors({"hidden": hidden}, {"hidden": self.model.embedding.weight[:1]})
            self.state = empty.filled(tensors)
        except ValueError as error:
            raise UserError(f"{shown(path)}: {error}; {other}") from None
        self.hidden, self.num_tokens = hidden.to(self.model.embedding.weight), num_tokens


_STATE_HEADER = b"lfm state 2\n"
"""Then sha256 of what follows, and a torch.save.  The checksum finds damage; it does not say who wrote the file."""


def _check_tensors(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, unless `found` could be `wanted` with other values."""
    for name in sorted(found.keys() | wanted.keys()):
        tensor, own = found.get(name), wanted.get(name)
        if not isinstance(tensor, Tensor) or own is None:
            raise ValueError(f"{name} is {'missing' if own is not None else 'of no state of this model'}")
        if tensor.shape != own.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(own.shape)}")
        if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex() or tensor.layout != own.layout:
            raise ValueError(f"{name} is of {tensor.dtype}, not {own.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if not tensor.is_floating_point() and (tensor < 0).any():
            raise ValueError(f"{name} is a negative count")
