"""A conversation: one sequence that goes on, whose state can be kept in a file."""

import hashlib
import io
import zipfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import read_file, shown, write_durably
from lfm.inference.sampling import SamplingConfig, choose, prefill, seen_of
from lfm.inference.text import StopFilter
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
        self.seen = seen_of(self.model)
        """Of each id, whether it was read: bool `[V]`, on the CPU; like the state replaced, never written into."""

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
            self.seen = self.seen | seen_of(self.model, ids)

    def reply(self) -> Iterator[int]:
        """Sampled ids, each read into the state as it is given, until the end of a document, which is not read."""
        if self.hidden is None:
            raise UserError("there is nothing to reply to; give some text first")
        limit = self.model.config.context_limit
        for _ in range(self.sampling.max_new_tokens):
            if limit is not None and self.num_tokens + 1 >= limit:
                return
            logits = self.model.logits(self.hidden)[0].float().cpu()
            token = choose(logits, self.sampling, self.generator, self.seen)
            if token == self.end_of_document:
                return
            self.read([token])
            yield token

    def reply_text(self, tokenizer: Tokenizer, after: Sequence[int]) -> Generator[str, None, None]:
        """A reply as text, a piece (which may be empty) for each id; `after`: the ids that it follows.

        A stop text ends it and is not given.  However it ends, by `close()` too, the state is then that of a reply
        which was what has been given: ids of which nothing was shown are not read, and of one of which a part was
        shown, that part, as the tokenizer encodes it.
        """
        decoder, stops = tokenizer.stream_decoder(after), StopFilter(self.sampling.stop)
        decoded = given = ""
        places = [(0, self._place())]
        """Characters of the reply that are whole there, and what was read; from the last one on that is all given."""
        try:
            for token in self.reply():
                piece = decoder.push(token)
                decoded += piece
                if piece:
                    places.append((len(decoded), self._place()))
                settled = stops.push(piece)
                given += settled
                yield settled
                if stops.found:
                    return
                while len(places) > 1 and places[1][0] <= len(given):
                    places.pop(0)
            rest = decoder.flush()
            places.append((len(decoded + rest), self._place()))
            rest = stops.push(rest) + stops.flush()
            given += rest
            yield rest
        finally:
            length, place = [place for place in places if place[0] <= len(given)][-1]
            self.state, self.hidden, self.num_tokens, self.seen = place
            if length < len(given):
                self.read(tokenizer.encode(given[length:]))

    def _place(self) -> tuple[Any, Tensor | None, int, Tensor]:
        return self.state, self.hidden, self.num_tokens, self.seen

    def save(self, path: Path, *, checkpoint: str) -> None:
        """Write the state to a file; `checkpoint` identifies the weights that it belongs to."""
        if self.hidden is None:
            return
        content = {
            "checkpoint": checkpoint,
            "num_tokens": self.num_tokens,
            "hidden": self.hidden.cpu(),
            "seen": self.seen.nonzero()[:, 0],
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
            tensors, seen = content["state"], content.get("seen")
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
            seen = _checked_ids(seen, self.seen)
            self.state = empty.filled(tensors)
        except ValueError as error:
            raise UserError(f"{shown(path)}: {error}; {other}") from None
        self.hidden, self.num_tokens, self.seen = hidden.to(self.model.embedding.weight), num_tokens, seen


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


def _checked_ids(found: Any, seen: Tensor) -> Tensor:
    """`seen` with what a file says; without a word of it, which repeats are penalized begins with this session."""
    if found is None:
        return torch.zeros_like(seen)
    if not isinstance(found, Tensor) or found.dtype != torch.long or found.dim() != 1 or found.layout != torch.strided:
        raise ValueError("seen is no list of ids")
    if len(found) and not (0 <= int(found.min()) and int(found.max()) < len(seen)):
        raise ValueError(f"seen has ids beyond the vocabulary of {len(seen)}")
    return torch.zeros_like(seen).index_fill(0, found, True)
