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

SCALARS = ("mean_log_probability", "min_log_probability", "entropy", "router_entropy")
"""Of an answer; the end of a question has the last alone, the others are 0."""


@dataclass
class Features:
    """Of n places in texts, fp32 on the CPU."""

    hidden: Float[Tensor, "n D"]
    """Final normalised hidden state."""
    liquid: Float[Tensor, "n L W"]
    """State of each recurrent layer; L = 0 where a family has none."""
    scalars: Float[Tensor, "n 4"]
    """`SCALARS`."""

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
def read(model: LanguageModel, rows: Sequence[Ids], state: Any = None) -> tuple[End, Float[Tensor, "B T D"]]:
    """Read rows of one length after a state of as many; their ends, and hidden states of the last `PREFILL_TOKENS`."""
    ids = torch.tensor([list(row) for row in rows], device=model.embedding.weight.device)
    total, hidden = torch.zeros(len(rows), dtype=torch.float64, device=ids.device), torch.empty(0)
    for piece in ids.split(PREFILL_TOKENS, dim=1):
        if isinstance(model, Decoder):
            hidden, state, found = model.advance_and_diagnose(piece, state)
            if found.routing:
                means = row_means(torch.stack([routing.means for routing in found.routing.values()]))
                total += means.entropy.double().mean(0) * piece.shape[1]
        else:
            hidden, state = model.advance(piece, state)
    return End(hidden[:, -1], state, total / ids.shape[1]), hidden


def batches_of_one_length(rows: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Places of rows, so that no filling is read."""
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    for _, places in sorted(by_length.items()):
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


@torch.no_grad()
def score_answers(
    model: LanguageModel, end: End, places: Sequence[int], answers: Sequence[Ids], *, batch_size: int
) -> tuple[AnswerScores, Features]:
    """Read answers after the prompts at `places` of `end`: how likely each is, and the features at its end."""
    n, device = len(answers), end.hidden.device
    scores = torch.zeros(4, n, dtype=torch.float64)
    liquid = recurrent_states(end.state)
    width = (0, 0) if liquid is None else tuple(liquid.shape[1:])
    features = Features(torch.empty(n, end.hidden.shape[1]), torch.empty(n, *width), torch.zeros(n, len(SCALARS)))
    longest = max(map(len, answers))
    at_once = max(1, min(batch_size, _LOGITS // (longest * model.config.vocab_size)))
    for batch in batches_of_one_length(answers, at_once):
        index = torch.tensor([places[i] for i in batch], device=device)
        state = end.state.map(lambda tensor, index=index: tensor[index])
        ids = torch.tensor([list(answers[i]) for i in batch], device=device)
        after, hidden = read(model, [answers[i] for i in batch], state)
        before = torch.cat([end.hidden[index][:, None], hidden[:, :-1]], dim=1)
        logs = F.log_softmax(model.logits(before).float(), dim=-1)
        of_ids = logs.gather(2, ids[..., None])[..., 0].double()
        entropy = -(logs.exp() * logs).sum(-1).double()
        found = torch.stack([of_ids.sum(1), of_ids.mean(1), of_ids.amin(1), entropy.mean(1)])
        scores[:, batch] = found.cpu()
        features.hidden[batch] = after.hidden.float().cpu()
        states = recurrent_states(after.state)
        if states is not None:
            features.liquid[batch] = states.float().cpu()
        features.scalars[batch] = torch.stack([*found[1:], after.router_entropy], dim=1).float().cpu()
    return AnswerScores(*scores), features


def question_features(end: End) -> Features:
    """At the ends of prompts."""
    scalars = torch.zeros(len(end.hidden), len(SCALARS))
    scalars[:, -1] = end.router_entropy.float().cpu()
    liquid = recurrent_states(end.state)
    n = len(end.hidden)
    states = torch.empty(n, 0, 0) if liquid is None else liquid.float().cpu()
    return Features(end.hidden.float().cpu(), states, scalars)
