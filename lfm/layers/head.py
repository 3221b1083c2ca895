"""The output projection: from final hidden states to logits, and to losses without the logits of all tokens."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.layers.loss import VocabularyShard, linear_cross_entropy, linear_token_losses
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored


class Head(nn.Module):
    """`multiplier * hidden weight^T + bias` over `vocab_size` ids, with a weight of its own or an embedding's.

    Rows of the weight past `vocab_size` are padding, which has no logits at all.  Where tensor-parallel processes share
    the vocabulary, each has its rows of it.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        stored_rows: int | None = None,
        tied_to: nn.Embedding | None = None,
        bias: bool = False,
        multiplier: float = 1.0,
        parts: Parts = PLAIN,
    ) -> None:
        """`stored_rows`: those of the weight on all processes together, by default `vocab_size`."""
        super().__init__()
        self.vocab_size, self.stored_rows, self.parts = vocab_size, stored_rows or vocab_size, parts
        self.multiplier = multiplier
        # In a tuple, where it is no submodule: the weight is the embedding's and has its name.
        self._tied_to = () if tied_to is None else (tied_to,)
        if tied_to is None:
            self.weight = parts.output_projection(hidden_size, self.stored_rows).weight
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def stored(self) -> dict[str, Stored]:
        # A bias is undeclared: it is of all ids, and no family that has one shares its vocabulary.
        return {} if self._tied_to else {"weight": Stored("weight", cut=0)}

    @property
    def projection(self) -> Float[Tensor, "rows D"]:
        """The weight with its padding: this process's rows of it."""
        return self._tied_to[0].weight if self._tied_to else self.weight

    @property
    def num_classes(self) -> int:
        """Rows of the projection that are no padding."""
        rows = len(self.projection)
        return min(rows, max(0, self.vocab_size - self.parts.tensor_rank * rows))

    @property
    def shard(self) -> VocabularyShard | None:
        """This process's place in a vocabulary that is cut."""
        if self.parts.tensor_group is None:
            return None
        rows = self.stored_rows // self.parts.tensor_size
        return VocabularyShard(self.parts.tensor_group, self.parts.tensor_rank * rows, rows)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Of all ids, where one process has them all."""
        return F.linear(self._scaled(hidden), self.projection[: self.num_classes], self.bias)

    def _scaled(self, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        return hidden if self.multiplier == 1.0 else hidden * self.multiplier

    def cross_entropy(
        self,
        hidden: Float[Tensor, "... D"],
        labels: Int[Tensor, "..."],
        *,
        token_weights: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """As `linear_cross_entropy`."""
        weights = token_weights.flatten() if token_weights is not None else None
        return linear_cross_entropy(
            self._scaled(hidden).flatten(0, -2),
            self.projection,
            labels.flatten(),
            num_classes=self.num_classes,
            token_weights=weights,
            bias=self.bias,
            shard=self.shard,
        )

    def token_losses(self, hidden: Float[Tensor, "*shape D"], labels: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """As `linear_token_losses`."""
        losses = linear_token_losses(
            self._scaled(hidden).flatten(0, -2),
            self.projection,
            labels.flatten(),
            num_classes=self.num_classes,
            bias=self.bias,
            shard=self.shard,
        )
        return losses.view(labels.shape)


class Hidden:
    """A model's final hidden states, for whoever reads whole rows of them.

    Where tensor-parallel processes cut the sequence there are two ways to put it together, by what the reader does.
    """

    def __init__(self, x: Float[Tensor, "B T D"], parts: Parts = PLAIN) -> None:
        self._x, self._parts = x, parts

    @functools.cached_property
    def cut(self) -> Float[Tensor, "B whole_T D"]:
        """For a `Head`, whose vocabulary is cut: each process's gradient is a summand."""
        return self._parts.whole_sequence(self._x, partial_gradients=True)

    @functools.cached_property
    def whole(self) -> Float[Tensor, "B whole_T D"]:
        """For a read-out that every process makes alike: each has the whole gradient."""
        return self._parts.whole_sequence(self._x, partial_gradients=False)
