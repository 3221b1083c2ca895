"""What a frozen backbone knows of an answer: its final hidden state, its recurrent states, statistics of the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm.inference.sampling import PREFILL_TOKENS
from lfm.kernels.router import row_means
from lfm.models.decoder import Decoder
from lfm.models.language_model import LanguageModel
from lfm.models.state import State

Ids = Sequence[int]

_RECURRENT = ("liquid", "hidden", "reservoirs", "h")
"""Fields of states that recurrences carry, in every family; caches, cells, traces and positions are none."""
_LOGITS = 1 << 26
"""So many are held at once: 256 MiB in fp32."""

SCALARS = ("log_probability", "min_log_probability", "entropy", "router_entropy")
"""Of an answer; the end of a question has the last alone, the others are 0.  The first is the sum over tokens, by which
options are chosen: their mean forgets how many there are."""


@dataclass
class Features:
    """Of n places in texts, fp32 on the CPU."""

    hidden: Float[Tensor, "n D"]
    """Final normalised hidden state."""
    liquid: Float[Tensor, "n L W"]
    """State of each recurrent layer; L = 0 where a family has none."""
    scalars: Float[Tensor, "n 4"]
    """`SCALARS`; the routers' is over all tokens read."""

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, places: Any) -> "Features":
        places = torch.as_tensor(places)
        return Features(self.hidden[places], self.liquid[places], self.scalars[places])

    @staticmethod
    def together(parts: Sequence["Features"]) -> "Features":
        return Features(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("hidden", "liquid", "scalars"))
        )


class End(NamedTuple):
    """What reading rows of one length led to."""

    hidden: Float[Tensor, "B D"]
    state: Any
    router_entropy: Float[Tensor, " B"]
    """Mean over tokens and layers, in nats; 0 without experts."""


class AnswerScores(NamedTuple):
    """Of answers after their prompts, on the CPU, float64."""

    log_probability: Float[Tensor, " n"]
    """Summed over tokens."""
    mean: Float[Tensor, " n"]
    lowest: Float[Tensor, " n"]
    """Of the least likely token."""
    entropy: Float[Tensor, " n"]
    """Mean over tokens of that of the next-token distribution."""


def recurrent_states(state: State) -> Float[Tensor, "B L W"] | None:
    """What the recurrences of a model carry, by layer; None where there are none."""
    found = []
    for name, tensor in state.tensors().items():
        if name.partition(".")[0] in _RECURRENT and tensor.is_floating_point():
            by_layer = tensor if name == "h" else tensor.flatten(1)[:, None]  # h has a dimension of layers
            found.append(by_layer.flatten(2))
    return torch.cat(found, dim=1) if found else None


@torch.no_grad()
def read(
    model: LanguageModel, rows: Sequence[Ids], state: Any = None, *, keep: int = 1
) -> tuple[End, Float[Tensor, "B kept D"]]:
    """Read rows of one length after a state of as many; their ends, and the hidden states of the last `keep` tokens."""
    ids = torch.tensor([list(row) for row in rows], device=model.embedding.weight.device)
    total, kept = torch.zeros(len(rows), dtype=torch.float64, device=ids.device), []
    for piece in ids.split(PREFILL_TOKENS, dim=1):
        if isinstance(model, Decoder):
            hidden, state, found = model.advance_and_diagnose(piece, state)
            if found.routing:
                means = row_means(torch.stack([routing.means for routing in found.routing.values()]))
                total += means.entropy.double().mean(0) * piece.shape[1]
        else:
            hidden, state = model.advance(piece, state)
        kept.append(hidden[:, -keep:])
    last = torch.cat(kept, dim=1)[:, -keep:]
    return End(last[:, -1], state, total / ids.shape[1]), last


def batches_of_one_length(rows: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Places of rows, so that no filling is read."""
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    for _, places in sorted(by_length.items()):
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


@torch.no_grad()
def score_options(
    model: LanguageModel, end: End, places: Sequence[int], options: Sequence[Ids], *, batch_size: int
) -> Float[Tensor, " n"]:
    """Log-probability of options, summed over their tokens, after the prompts at `places` of `end`; float64, CPU.

    Shorter ones are filled on the right, where nothing that is scored sees it; the states after them are dropped.
    """
    sums = torch.zeros(len(options), dtype=torch.float64)
    longest, device = max(map(len, options)), end.hidden.device
    at_once = max(1, min(batch_size, _LOGITS // (longest * model.config.vocab_size)))
    for start in range(0, len(options), at_once):
        batch = range(start, min(start + at_once, len(options)))
        index = torch.tensor([places[i] for i in batch], device=device)
        lengths = torch.tensor([len(options[i]) for i in batch], device=device)
        filled = [[*options[i], *[options[i][-1]] * (longest - len(options[i]))] for i in batch]
        before = end.hidden[index][:, None]
        if longest > 1:
            state = end.state.map(lambda tensor, index=index: tensor[index])
            _, hidden = read(model, [row[:-1] for row in filled], state, keep=longest - 1)
            before = torch.cat([before, hidden], dim=1)
        logits, ids = model.logits(before).float(), torch.tensor(filled, device=device)
        logs = logits.gather(2, ids[..., None])[..., 0].double() - logits.logsumexp(-1).double()
        inside = torch.arange(longest, device=device) < lengths[:, None]
        sums[start : start + len(batch)] = (logs * inside).sum(1).cpu()
    return sums


@torch.no_grad()
def read_answers(
    model: LanguageModel, prompts: Sequence[Ids], answers: Sequence[Ids], *, batch_size: int
) -> tuple[AnswerScores, Features]:
    """Read prompts with their answers behind them: how likely each answer is, and the features at its end."""
    n, rows = len(answers), [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    scores, places, parts = torch.zeros(4, n, dtype=torch.float64), list[int](), list[Features]()
    for batch in batches_of_one_length(rows, batch_size):
        longest = max(len(answers[i]) for i in batch)
        at_once = max(1, _LOGITS // (longest * model.config.vocab_size))
        for start in range(0, len(batch), at_once):
            here = batch[start : start + at_once]
            found, features = _read_answers(model, [rows[i] for i in here], [len(answers[i]) for i in here])
            scores[:, here] = found
            places += here
            parts.append(features)
    order = torch.tensor(places).argsort()
    return AnswerScores(*scores), Features.together(parts).rows(order)


def _read_answers(model: LanguageModel, rows: Sequence[Ids], lengths: Sequence[int]) -> tuple[Tensor, Features]:
    """Of rows of one length that end with an answer of so many tokens; scores are `[4, B]`."""
    longest = max(lengths)
    end, hidden = read(model, rows, keep=longest + 1)
    ids = torch.tensor([row[-longest:] for row in rows], device=hidden.device)
    logs = F.log_softmax(model.logits(hidden[:, :-1]).float(), dim=-1)
    of_ids, entropy = logs.gather(2, ids[..., None])[..., 0].double(), -(logs.exp() * logs).sum(-1).double()
    counts = torch.tensor(lengths, device=ids.device)
    inside = torch.arange(longest, 0, -1, device=ids.device) <= counts[:, None]  # the last ones
    total, lowest = (of_ids * inside).sum(1), of_ids.masked_fill(~inside, torch.inf).amin(1)
    found = torch.stack([total, total / counts, lowest, (entropy * inside).sum(1) / counts])
    statistics = (total, lowest, found[3], end.router_entropy)
    liquid, scalars = recurrent_states(end.state), torch.stack(statistics, dim=1)
    states = torch.empty(len(rows), 0, 0) if liquid is None else liquid.float().cpu()
    return found.cpu(), Features(end.hidden.float().cpu(), states, scalars.float().cpu())


def question_features(end: End) -> Features:
    """At the ends of prompts."""
    scalars = torch.zeros(len(end.hidden), len(SCALARS))
    scalars[:, -1] = end.router_entropy.float().cpu()
    liquid = recurrent_states(end.state)
    n = len(end.hidden)
    states = torch.empty(n, 0, 0) if liquid is None else liquid.float().cpu()
    return Features(end.hidden.float().cpu(), states, scalars)
