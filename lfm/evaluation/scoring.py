"""How likely a model finds given tokens: rows of different lengths side by side, without any padding."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm.inference.sampling import PREFILL_TOKENS
from lfm.models.language_model import LanguageModel

_LOGITS = 1 << 25
"""So many are held at once: 128 MiB in fp32."""

Ids = Sequence[int]


class Scores(NamedTuple):
    """Of consecutive tokens of a row, on the CPU."""

    nats: Tensor
    """-ln of each one's probability, float64 `[n]`."""
    is_greedy: Tensor
    """Whether it is the most likely one (of equal ones the first), bool `[n]`."""


class Piece(NamedTuple):
    """What reading `[start, start + T)` of some rows gave."""

    rows: list[int]
    """Indices of the rows, the shortest first."""
    start: int
    hidden: Tensor
    """Final hidden states `[len(rows), T, D]`."""
    state: Any
    """After it, of these rows in this order."""

    @property
    def end(self) -> int:
        return self.start + self.hidden.shape[1]


@torch.no_grad()
def read_rows(model: LanguageModel, rows: Sequence[Ids], state: Any = None) -> Iterator[Piece]:
    """Read rows of any lengths as one batch that a row leaves at its end, so that no filling enters a state.

    `state` is that of the prefixes, in order of the rows (None: there are none).  Empty rows are not read.
    """
    device = model.embedding.weight.device
    alive, start = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i])), 0
    if alive:
        state = _rows_of(state, alive, len(rows), device)
    while alive:
        end = min(len(rows[alive[0]]), start + PREFILL_TOKENS)
        ids = torch.tensor([list(rows[i][start:end]) for i in alive], device=device)
        hidden, state = model.advance(ids, state)
        yield Piece(alive, start, hidden, state)
        staying = [place for place, i in enumerate(alive) if len(rows[i]) > end]
        state = _rows_of(state, staying, len(alive), device) if staying else None
        alive, start = [alive[place] for place in staying], end


def _rows_of(state: Any, wanted: list[int], count: int, device: torch.device) -> Any:
    if state is None or wanted == list(range(count)):
        return state
    index = torch.tensor(wanted, device=device)
    return state.map(lambda tensor: tensor[index])


@torch.no_grad()
def score_tokens(model: LanguageModel, hidden: Tensor, targets: Ids) -> Scores:
    """Scores of `targets [n]` after final hidden states `[n, D]`; logits are fp32."""
    wanted = torch.tensor(list(targets), device=hidden.device)
    nats, is_greedy = [], []
    at_once = max(1, _LOGITS // model.config.vocab_size)
    for states, ids in zip(hidden.split(at_once), wanted.split(at_once), strict=True):
        logits = model.logits(states).float()
        nats.append((logits.logsumexp(-1) - logits.gather(-1, ids[:, None])[:, 0]).double().cpu())
        is_greedy.append((logits.argmax(-1) == ids).cpu())
    return Scores(torch.cat(nats), torch.cat(is_greedy))


def score_rows(
    model: LanguageModel, rows: Sequence[Ids], *, first: Sequence[int] | None = None, batch_size: int
) -> list[Scores]:
    """Scores of each row's ids from `first` on (by default 1, the least: a row's first id follows nothing).

    `batch_size` rows of about one length are read at a time.  What a row scores does not depend on it but for rounding.
    """
    firsts = [1] * len(rows) if first is None else first
    assert all(at >= 1 for at in firsts), firsts
    found = [Scores(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool)) for _ in rows]
    for batch in _batches(sorted(range(len(rows)), key=lambda i: -len(rows[i])), batch_size):
        wanted = [firsts[i] - 1 for i in batch]
        for row, scores in _following(model, [rows[i] for i in batch], None, wanted):
            found[batch[row]] = _joined(found[batch[row]], scores)
    return found


def score_continuations(model: LanguageModel, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int) -> list[Scores]:
    """Scores of the ids of each continuation after its prefix; neither is empty.

    A prefix that several continuations share is read once: they go on from its state.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, (prefix, _) in enumerate(pairs):
        sharing.setdefault(tuple(prefix), []).append(i)
    found: list[Scores | None] = [None] * len(pairs)
    for prefixes in _batches(sorted(sharing, key=lambda prefix: (-len(prefix), prefix)), batch_size):
        ends = _after(model, prefixes)
        wanted = [(place, i) for place, prefix in enumerate(prefixes) for i in sharing[prefix]]
        for batch in _batches(wanted, batch_size):
            after = [ends[place] for place, _ in batch]
            continuations = [pairs[i][1] for _, i in batch]
            firsts = score_tokens(model, torch.cat([hidden for hidden, _ in after]), [c[0] for c in continuations])
            scores = [Scores(*(x[place : place + 1] for x in firsts)) for place in range(len(batch))]
            state = type(after[0][1]).stack([state for _, state in after])
            for row, of_rest in _following(model, continuations, state, [0] * len(batch)):
                scores[row] = _joined(scores[row], of_rest)
            for (_, i), of_pair in zip(batch, scores, strict=True):
                found[i] = of_pair
    return [scores for scores in found if scores is not None]


def _following(
    model: LanguageModel, rows: Sequence[Ids], state: Any, starts: Sequence[int]
) -> Iterator[tuple[int, Scores]]:
    """A row and scores of the next of its ids, read after `state`; of the ids behind each place from `starts` on."""
    for piece in read_rows(model, [row[:-1] for row in rows], state):
        here = [(place, row, max(piece.start, starts[row])) for place, row in enumerate(piece.rows)]
        here = [(place, row, start) for place, row, start in here if start < piece.end]
        if not here:
            continue
        hidden = torch.cat([piece.hidden[place, start - piece.start :] for place, _, start in here])
        targets = [id for _, row, start in here for id in rows[row][start + 1 : piece.end + 1]]
        scores = score_tokens(model, hidden, targets)
        lengths = [piece.end - start for _, _, start in here]
        for (_, row, _), nats, is_greedy in zip(here, *(x.split(lengths) for x in scores), strict=True):
            yield row, Scores(nats, is_greedy)


def _after(model: LanguageModel, prefixes: Sequence[Ids]) -> list[tuple[Tensor, Any]]:
    """Final hidden state `[1, D]` of the last id of each prefix, and the state after it, of one row."""
    ends: dict[int, tuple[Tensor, Any]] = {}
    for piece in read_rows(model, prefixes):
        for place, row in enumerate(piece.rows):
            if len(prefixes[row]) == piece.end:
                here = slice(place, place + 1)
                ends[row] = piece.hidden[here, -1], piece.state.map(lambda tensor, here=here: tensor[here])
    return [ends[row] for row in range(len(prefixes))]


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _joined(one: Scores, other: Scores) -> Scores:
    return Scores(torch.cat([one.nats, other.nats]), torch.cat([one.is_greedy, other.is_greedy]))
