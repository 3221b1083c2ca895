"""The uncertainty head: from features of a frozen backbone to the log-odds that its answer is right."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from lfm.config import Config, CountOrZero, Width
from lfm.errors import NonFiniteError, UserError
from lfm.medical.features import SCALARS, Features
from lfm.medical.questions import share_of

_SEED = 0
_BATCH, _WEIGHT_DECAY = 128, 0.1
_SCALARS_RATE, _RATE = 3e-3, 2e-4
_ROUNDS, _PATIENCE, _LEAST_STEPS = 100, 8, 40
"""A round is a pass through the examples, of so many steps at least."""
_LEAST_GAIN = 1e-4
"""Of the held-out loss, in nats: less does not count as better."""
_HELD_OUT = 0.2
_MARGIN = 0.1
"""Beyond the numbers of the fitted answers, of their range: there is always one that is a little less likely."""
_THREADS = 4
"""Its products are small: more threads wait for each other, and next to other work for minutes."""


PARTS: tuple[str, ...] = ("scalars", "hidden", "liquid")
"""Of a head's inputs, in the order of its columns and of learning."""


class HeadConfig(Config):
    hidden_size: Width
    num_liquid: CountOrZero
    """Recurrent layers whose states it reads; 0: none."""
    liquid_size: CountOrZero
    """Numbers of one of them."""
    projection_size: Width = 64
    width: Width = 256
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of its inputs, while it learns."""

    @property
    def num_inputs(self) -> int:
        return self.hidden_size + self.num_liquid * self.projection_size + len(SCALARS)

    @property
    def num_parameters(self) -> int:
        projections = self.num_liquid * (self.liquid_size + 1) * self.projection_size
        return projections + (self.num_inputs + 1) * self.width + self.width + 1

    @property
    def flops(self) -> int:
        """Of one answer, forward: a multiply and an add are two."""
        projections = self.num_liquid * self.liquid_size * self.projection_size
        return 2 * (projections + self.num_inputs * self.width + self.width)


def _spread(scalars: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Log-probabilities as log-odds and the answer's entropy by its logarithm: of a sure model all are next to 0, and
    0.9 and 0.999 differ as much as 0.5 and 0.9."""
    sure, entropy = scalars[:, :2].clamp_max(-1e-6), scalars[:, 2:3].clamp_min(0)
    return torch.cat([sure - torch.log(-torch.expm1(sure)), torch.log(entropy + 1e-4), scalars[:, 3:]], dim=1)


class UncertaintyHead(nn.Module):
    """`w2 gelu(W1 [scalars; hidden; P_1 liquid_1; ...; P_L liquid_L] + b1) + b2`, of standardised inputs.

    w2 and the columns of W1 that read states begin at 0: what many inputs say by chance has not to be unlearnt.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.projections = nn.ModuleList([nn.Linear(c.liquid_size, c.projection_size) for _ in range(c.num_liquid)])
        self.hidden = nn.Linear(c.num_inputs, c.width)
        self.out = nn.Linear(c.width, 1)
        for parameter in (self.out.weight, self.out.bias, self.hidden.weight):
            nn.init.zeros_(parameter)
        nn.init.normal_(self.hidden.weight[:, : len(SCALARS)], std=0.5)
        self.dropout = nn.Dropout(c.dropout)
        shapes = {"hidden": (c.hidden_size,), "liquid": (c.num_liquid, c.liquid_size), "scalars": (len(SCALARS),)}
        for name, shape in shapes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_scale", torch.ones(shape))
        bounds = {"least": -torch.inf, "most": torch.inf}
        for name, bound in bounds.items():
            self.register_buffer(f"scalars_{name}", torch.full((len(SCALARS),), bound))
        self.register_buffer("lowest", torch.tensor(torch.inf))

    @torch.no_grad()
    def bound(self, features: Features) -> None:
        """Remember what numbers the fitted answers had: of less likely ones nothing was learnt, and a network says of
        them whatever its slopes come to."""
        scalars = self._values(features, "scalars")
        least, most = scalars.amin(0), scalars.amax(0)
        self.get_buffer("scalars_least").copy_(least - _MARGIN * (most - least))
        self.get_buffer("scalars_most").copy_(most + _MARGIN * (most - least))
        self.get_buffer("lowest").copy_(self.eval()(features).amin())

    def reads(self, features: Features) -> bool:
        """Whether it was made for features of these sizes."""
        c = self.config
        of_liquid = features.liquid.shape[1:]
        return features.hidden.shape[1] == c.hidden_size and (
            not c.num_liquid or tuple(of_liquid) == (c.num_liquid, c.liquid_size)
        )

    def outside(self, features: Features) -> Tensor:
        """Whether an answer is far less likely, or its entropy higher, than of any that was fitted; bool `[n]`."""
        scalars = self._values(features, "scalars")
        unlikely = (scalars[:, :2] < self.get_buffer("scalars_least")[:2]).any(1)
        return unlikely | (scalars[:, 2] > self.get_buffer("scalars_most")[2])

    def standardise(self, features: Features) -> None:
        """Take means and standard deviations of the inputs from these."""
        for name in PARTS:
            values = self._values(features, name)
            if self.config.num_liquid or name != "liquid":
                getattr(self, f"{name}_mean").copy_(values.mean(0))
                getattr(self, f"{name}_scale").copy_(values.std(0).clamp_min(1e-6))

    @staticmethod
    def _values(features: Features, name: str) -> Tensor:
        return _spread(features.scalars) if name == "scalars" else getattr(features, name)

    def _standard(self, features: Features, name: str) -> Tensor:
        values = self._values(features, name)
        if name == "scalars":
            values = values.clamp(self.get_buffer("scalars_least"), self.get_buffer("scalars_most"))
        # A number that no fitted example came near must not decide alone.
        return ((values - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_scale")).clamp(-8, 8)

    def forward(self, features: Features, parts: Sequence[str] = PARTS) -> Float[Tensor, " n"]:
        """Log-odds that each answer is right, before calibration; with some `parts`, by those inputs alone."""
        c = self.config
        widths = (len(SCALARS), c.hidden_size, c.num_liquid * c.projection_size)
        columns = dict(zip(PARTS, self.hidden.weight.split(widths, dim=1), strict=True))
        inner = self.hidden.bias
        for part in parts:
            if part == "liquid" and not c.num_liquid:
                continue
            values = self._standard(features, part)
            if part != "scalars":
                values = self.dropout(values)
            if part == "liquid":
                values = torch.cat([project(values[:, i]) for i, project in enumerate(self.projections)], dim=1)
            inner = inner + F.linear(values, columns[part])
        return self.out(F.gelu(inner))[:, 0]

    @torch.no_grad()
    def logits(self, features: Features) -> np.ndarray:
        """float64 `[n]`; of answers `outside` none is above the lowest that was fitted."""
        self.eval()
        found = self(features)
        return torch.where(self.outside(features), found.clamp_max(self.get_buffer("lowest")), found).double().numpy()


def config_for(features: Features, *, with_liquid: bool = True) -> HeadConfig:
    num_liquid = features.liquid.shape[1] if with_liquid else 0
    return HeadConfig(
        hidden_size=features.hidden.shape[1],
        num_liquid=num_liquid,
        liquid_size=features.liquid.shape[2] if num_liquid else 0,
    )


def fit(
    features: Features, right: np.ndarray, groups: Sequence[str], config: HeadConfig, *, seed: int = _SEED
) -> UncertaintyHead:
    """Learn by the log score, a strictly proper scoring rule (Gneiting and Raftery 2007).

    A fifth of the groups is held out, which stops the training.  Raises UserError where the answers are all right or
    all wrong, or too few.
    """
    held_out = np.array([share_of(f"head {group}") < _HELD_OUT for group in groups])
    if right.all() or not right.any():
        what = "right" if right.all() else "wrong"
        raise UserError(
            f"all {len(right)} answers of the model are {what}, and a head learns from both; give other data"
        )
    if held_out.all() or not held_out.any() or len(right) < 20:
        raise UserError(
            f"{len(right)} questions in {len(set(groups))} groups are too few to fit a head; give 20 or more"
        )
    places, wanted = torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(right).float()
    inside, outside = features.rows(places), features.rows(np.flatnonzero(held_out))
    labels, outside_labels = wanted[places], wanted[torch.from_numpy(held_out)]
    if not all(torch.isfinite(part).all() for part in (features.hidden, features.liquid, features.scalars)):
        raise NonFiniteError("the model's hidden states are not finite, and no head learns from them")
    with torch.random.fork_rng(devices=[]), _few_threads():
        torch.manual_seed(seed)
        head = UncertaintyHead(config)
        head.standardise(inside)
        # First what four numbers say, which say most; then what hundreds of others add, as far as it holds outside.
        for count, rate in ((1, _SCALARS_RATE), (2, _RATE), (3, _RATE)):
            if count < 3 or config.num_liquid:
                _learn(head, PARTS[:count], rate, inside, labels, outside, outside_labels)
        head.bound(features)
    return head.eval()


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, _THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _learn(
    head: UncertaintyHead,
    parts: Sequence[str],
    rate: float,
    inside: Features,
    labels: Tensor,
    outside: Features,
    outside_labels: Tensor,
) -> None:
    """Until the log loss outside is no longer less; the head has the weights of the least then, or those it had."""

    def loss_outside() -> float:
        head.eval()
        with torch.no_grad():
            return float(F.binary_cross_entropy_with_logits(head(outside, parts), outside_labels))

    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    best, since, kept = loss_outside(), 0, copy.deepcopy(head.state_dict())
    passes = math.ceil(_LEAST_STEPS / math.ceil(len(labels) / _BATCH))
    for _ in range(_ROUNDS):
        head.train()
        for batch in (batch for _ in range(passes) for batch in torch.randperm(len(labels)).split(_BATCH)):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(inside.rows(batch), parts), labels[batch]).backward()
            optimizer.step()
        found = loss_outside()
        if found < best - _LEAST_GAIN:
            best, since, kept = found, 0, copy.deepcopy(head.state_dict())
        else:
            since += 1
            if since >= _PATIENCE:
                break
    head.load_state_dict(kept)
