"""The uncertainty head: from features of a frozen backbone to the log-odds that its answer is right."""

from collections.abc import Sequence

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
_WEIGHT_DECAYS = (0.01, 0.1, 1.0)
_EPOCHS, _PATIENCE, _BATCH, _LEARNING_RATE = 60, 8, 128, 1e-3
_HELD_OUT = 0.2


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


class UncertaintyHead(nn.Module):
    """`w2 gelu(W1 [hidden; P_1 liquid_1; ...; P_L liquid_L; scalars] + b1) + b2`, of standardised inputs."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.projections = nn.ModuleList([nn.Linear(c.liquid_size, c.projection_size) for _ in range(c.num_liquid)])
        self.hidden = nn.Linear(c.num_inputs, c.width)
        self.out = nn.Linear(c.width, 1)
        self.dropout = nn.Dropout(c.dropout)
        shapes = {"hidden": (c.hidden_size,), "liquid": (c.num_liquid, c.liquid_size), "scalars": (len(SCALARS),)}
        for name, shape in shapes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_scale", torch.ones(shape))

    def standardise(self, features: Features) -> None:
        """Take means and standard deviations of the inputs from these."""
        for name in ("hidden", "liquid", "scalars"):
            values = getattr(features, name)
            if self.config.num_liquid or name != "liquid":
                getattr(self, f"{name}_mean").copy_(values.mean(0))
                getattr(self, f"{name}_scale").copy_(values.std(0).clamp_min(1e-6))

    def forward(self, features: Features) -> Float[Tensor, " n"]:
        """Log-odds that each answer is right, before calibration."""

        def standard(name: str) -> Tensor:
            values = getattr(features, name)
            # A number that no fitted example came near must not decide alone.
            return ((values - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_scale")).clamp(-8, 8)

        parts = [standard("hidden")]
        if self.config.num_liquid:
            states = self.dropout(standard("liquid"))
            parts += [project(states[:, layer]) for layer, project in enumerate(self.projections)]
        inputs = torch.cat([*map(self.dropout, parts[:1]), *parts[1:], standard("scalars")], dim=1)
        return self.out(F.gelu(self.hidden(inputs)))[:, 0]

    @torch.no_grad()
    def logits(self, features: Features) -> np.ndarray:
        """float64 `[n]`."""
        self.eval()
        return self(features).double().numpy()


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

    A fifth of the groups is held out: it stops the training and chooses the weight decay.  Raises UserError where the
    answers are all right or all wrong, or too few.
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
    best: tuple[float, dict[str, Tensor]] | None = None
    with torch.random.fork_rng(devices=[]):
        for weight_decay in _WEIGHT_DECAYS:
            torch.manual_seed(seed)
            head = UncertaintyHead(config)
            head.standardise(inside)
            found = _fit_once(head, inside, labels, outside, outside_labels, weight_decay)
            if best is None or found[0] < best[0]:
                best = found
        assert best is not None
        head = UncertaintyHead(config)
        head.load_state_dict(best[1])
    return head.eval()


def _fit_once(
    head: UncertaintyHead,
    inside: Features,
    labels: Tensor,
    outside: Features,
    outside_labels: Tensor,
    weight_decay: float,
) -> tuple[float, dict[str, Tensor]]:
    """The least held-out log loss, and the weights that had it."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=weight_decay)
    best, since, kept = float("inf"), 0, {}
    for _ in range(_EPOCHS):
        head.train()
        for batch in torch.randperm(len(labels)).split(_BATCH):
            loss = F.binary_cross_entropy_with_logits(head(inside.rows(batch)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        head.eval()
        with torch.no_grad():
            found = float(F.binary_cross_entropy_with_logits(head(outside), outside_labels))
        if found < best:
            best, since, kept = found, 0, {name: tensor.clone() for name, tensor in head.state_dict().items()}
        else:
            since += 1
            if since >= _PATIENCE:
                break
    return best, kept
