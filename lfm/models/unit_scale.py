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
"""`depth_rate` times the number of parts that write to the stream.  At the full rate all layers together amplify what
all tokens have in common, in a step or two from nothing to most of the stream, and its sign is left to chance."""

LOGIT_STD = 0.25
"""Of the first logits of an output projection that is not the embedding: they add 0.03 to the first loss."""

ROUTER_STD = 1.0
"""Of a router's first logits."""

_SMALLEST, _LARGEST = 1e-6, 1e6
"""Between which multipliers are: bf16 and fp32 hold what they scale."""

_WRITING = ("attention.out.weight", "attention.o.weight", "moe.down", "down.weight", "liquid.output.weight")
"""Ends of the names of matrices through which a part writes to the stream, in memory and in checkpoints."""


class UnitScaleConfig(FamilyConfig):
    """What the families have whose stream can begin at RMS 1."""

    initialization: Literal["unit", "published"] = "unit"
    """unit: residual stream of RMS 1, a first loss near that of guessing.  published: N(0, init_method_std)."""
    init_method_std: float = Field(default=PUBLISHED_STD, gt=0)
    """Of initialization: published."""
    embedding_multiplier: float | None = Field(default=None, gt=_SMALLEST, lt=_LARGEST)
    """Factor on the embeddings that the first layer takes.  null: hidden_size / 3, or 1 where published."""
    logit_multiplier: float = Field(default=1.0, gt=_SMALLEST, lt=_LARGEST)
    """Factor on the logits."""
    depth_rate: float | None = Field(default=None, gt=0, le=1)
    """Learning rate of the matrices through which parts write to the stream, over that of the others.  null: 3 / number
    of such parts, at most 1; or 1 where published."""
    untie_embeddings_and_output_weights: bool = False
    """An output projection of its own, in place of the embedding."""

    @model_validator(mode="after")
    def _settle(self) -> "UnitScaleConfig":
        """The embedding's multiplier and the depth rate are numbers from here on, and in every checkpoint."""
        published = self.initialization == "published"
        if self.embedding_multiplier is None:
            multiplier = 1.0 if published else self.hidden_size / EMBEDDING_WIDTH
            object.__setattr__(self, "embedding_multiplier", multiplier)  # frozen from here on
        if self.depth_rate is None:
            object.__setattr__(self, "depth_rate", 1.0 if published else min(1.0, DEPTH_RATE / self.num_parts))
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
        assert self.depth_rate is not None
        return self.depth_rate if name.endswith(_WRITING) else 1.0


def initial_std(name: str, shape: Sequence[int], config: UnitScaleConfig) -> float:
    """Standard deviation of the matrix with this global name.

    | matrix | unit | published |
    | --- | --- | --- |
    | embedding | 1 / embedding_multiplier: a stream of RMS 1 | init_method_std |
    | output projection that is not the embedding | first logits of LOGIT_STD | init_method_std |
    | attention o, downs, liquid output | 1 / sqrt(inputs x parts) | init_method_std / sqrt(2 num_layers) |
    | router | first logits of ROUTER_STD | init_method_std |
    | every other | 1 / sqrt(inputs) | init_method_std |

    With unit, what all parts together add to the stream has an RMS of at most 1.
    """
    if config.initialization == "published":
        return config.init_method_std / ((2 * config.num_layers) ** 0.5 if name.endswith(_WRITING) else 1)
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
