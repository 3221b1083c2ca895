"""What a layer takes from outside, so that a parallel build can swap it: linears, shared weights, token dispatcher."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lfm.layers.embedding import Embedding
from lfm.layers.linear import Linear


class Parts:
    """The plain parts: one process holds every weight and every token.

    `tensor_size` processes share the heads, the widths and the vocabulary.  Each has its share of the activations
    between layers, of the size that `[B, T, D]` below has with `T = whole T / tensor_size`: of the rows one after the
    other, the first process has the first `B T` tokens.  So a share is B pieces of rows, T consecutive tokens each.
    """

    tensor_size: int = 1
    tensor_rank: int = 0
    tensor_group: dist.ProcessGroup | None = None
    """None where tensor_size is 1."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        """`[B, T, in]` -> `[B, whole T, out / tensor_size]`."""
        return Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        """`[B, whole T, in / tensor_size]` -> `[B, T, out]`, summed over the processes."""
        return Linear(in_features, out_features, bias=bias)

    def vocabulary_embedding(self, num_embeddings: int, hidden_size: int) -> nn.Embedding:
        """Ids `[B, whole T]` -> `[B, T, D]`."""
        return Embedding(num_embeddings, hidden_size)

    def output_projection(self, hidden_size: int, num_embeddings: int) -> nn.Linear:
        """Holder of the untied head's weight `[V / tensor_size, D]`."""
        return nn.Linear(hidden_size, num_embeddings, bias=False)

    def shared(self, weight: Tensor) -> Tensor:
        """A weight that every process holds whole and applies to its own tokens: its gradient is their sum."""
        return weight

    def whole_sequence(self, x: Tensor, *, partial_gradients: bool) -> Tensor:
        """`[B, T, ...]` -> `[B, whole T, ...]`.

        `partial_gradients`: each process's gradient of the result is a summand, else each has the whole of it.
        """
        return x

    def gather_units(self, x: Tensor) -> Tensor:
        """`[..., n / tensor_size]` -> `[..., n]`; every process then computes the same."""
        return x

    def own_units(self, x: Tensor) -> Tensor:
        """`[..., n]`, equal on all processes, -> this process's `[..., n / tensor_size]`."""
        return x

    def token_dispatcher(self, num_experts: int) -> "TokenDispatcher":
        return TokenDispatcher(num_experts)


class TokenDispatcher(nn.Module):
    """How tokens reach the experts; plain: experts `0..num_experts` are all here, and tokens stay."""

    width_parts: int = 1
    """Into how many parts each expert's width is cut."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first, self.count = 0, num_experts

    def prepare(self, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, T, D]` and the routing of whole rows, `[B * whole T, k]` each -> both for the same tokens."""
        return x, experts, weights

    def announce(self, load: Tensor) -> Any:
        """Tell the others `load [num_experts]` of the rows that `run` will get; for it, as soon as it is known."""

    def run(self, inputs: Tensor, load: Tensor, announced: Any, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`compute(rows, load)` at the experts' home for `inputs [m, D]`, sorted by expert, dropped rows last."""
        return compute(inputs, load)

    def finish(self, y: Tensor) -> Tensor:
        """What `prepare` brought together, cut again: `[B, ..., D]` -> `[B, T, D]`."""
        return y


PLAIN = Parts()
