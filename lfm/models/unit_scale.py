"""Initialization of lfm and transformer: as published, or such that the residual stream has RMS 1 from its start.

With a published embedding of N(0, 0.02) the first attention, an average over the prefix that is nearly the same for
all tokens, is ten times what tells tokens apart; the norms behind it scale that up, and routers and reservoirs see all
tokens alike.  docs/recipe.md has the measurements.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from lfm.models.language_model import FamilyConfig

PUBLISHED_STD = 0.02

EMBEDDING_WIDTH = 3.0
"""hidden_size / embedding_multiplier: a wider model takes a smaller learning rate, and its embedding, whose rate is
multiplied too, keeps its own."""

DEPTH_RATE = 3.0
"""Of the matrices through which a part writes to the stream, times the number of parts: their learning rate over the
others'.  At the full rate all layers together amplify what all tokens have in common, in a step or two from nothing to
most of the stream, and its sign is left to chance."""

LOGIT_STD = 0.25
"""Of the first logits of an output projection that is not the embedding: they add 0.03 to the first loss."""

ROUTER_STD = 1.0
"""Of a router's first logits."""

_WRITING = ("attention.out.weight", "attention.o.weight", "moe.down", "down.weight", "liquid.output.weight")
"""Ends of the names of matrices through which a part writes to the stream, in memory and in checkpoints."""


class UnitScaleConfig(FamilyConfig):
    """What the families have whose stream can begin at RMS 1."""

    initialization: Literal["unit", "published"] = "unit"
    """unit: residual stream of RMS 1, a first loss near that of guessing.  published: N(0, init_method_std)."""
    init_method_std: float = Field(default=PUBLISHED_STD, gt=0)
    """Of initialization: published."""
    embedding_multiplier: float | None = Field(default=None, gt=0)
    """Factor on the embeddings that the first layer takes.  null: hidden_size / 3, or 1 where published."""
    logit_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the logits."""
    untie_embeddings_and_output_weights: bool = False

    @model_validator(mode="after")
    def _settle(self) -> "UnitScaleConfig":
        """The embedding's multiplier is a number from here on, and in every checkpoint."""
        published = self.initialization == "published"
        if self.embedding_multiplier is None:
            multiplier = 1.0 if published else self.hidden_size / EMBEDDING_WIDTH
            object.__setattr__(self, "embedding_multiplier", multiplier)  # frozen from here on
        for key in ("embedding_multiplier", "logit_multiplier"):
            if published and getattr(self, key) != 1.0:
                raise ValueError(
                    f"initialization=published is for multipliers of 1 and {key} is {getattr(self, key):g}; leave "
                    f"{key} out, or set initialization=unit"
                )
        if not published and self.init_method_std != PUBLISHED_STD:
            raise ValueError(
                f"init_method_std={self.init_method_std:g} is of initialization=published; leave it out, or set "
                "initialization=published"
            )
        return self

    @property
    def is_tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    @property
    def num_parts(self) -> int:
        """Summands that layers add to the stream."""
        return 2 * self.num_layers

    def lr_multiple(self, name: str) -> float:
        if self.initialization == "published" or not name.endswith(_WRITING):
            return 1.0
        return min(1.0, DEPTH_RATE / self.num_parts)


def unit_std(name: str, shape: Sequence[int], config: UnitScaleConfig) -> float:
    """Standard deviation of the matrix with this global name.

    | matrix | |
    | --- | --- |
    | embedding | 1 / embedding_multiplier: a stream of RMS 1 |
    | output projection that is not the embedding | first logits of LOGIT_STD |
    | attention o, expert and mlp down, liquid output | 1 / sqrt(inputs x parts): all parts together add at most 1 |
    | router | first logits of ROUTER_STD |
    | every other | 1 / sqrt(inputs) |
    """
    assert config.embedding_multiplier is not None
    if name == "embedding.weight":
        return 1 / config.embedding_multiplier
    std = shape[-1] ** -0.5
    if name == "head.weight":
        return std * LOGIT_STD / config.logit_multiplier
    if name.endswith("router.weight"):
        return std * ROUTER_STD
    if name.endswith(_WRITING):
        return std * config.num_parts**-0.5
    return std
