"""Stacked LSTM over packed rows, with a functional state."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.kernels.lstm import lstm_stack, takes
from lfm.kernels.recording import is_recording
from lfm.layers.cost import Cost, matrices
from lfm.layers.documents import Documents, Lengths


class StackedLSTM(nn.Module):
    """`i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c = sig(f) c + sig(i) tanh(g);  h = sig(o) tanh(c)`, a layer on
    the other, with dropout between layers while training.

    Hochreiter & Schmidhuber 1997; the names, shapes and gate order are torch.nn.LSTM's.  By the library all of it runs
    in at least fp32: on a GPU bf16 weights become fp32 for the call, and cuDNN multiplies fp32 in TF32, in which they
    are exact.  By steps, which take no state, outputs are rounded to the weights' dtype between the layers.
    """

    backend: Literal["auto", "library", "steps"] = "auto"
    """steps: our kernels, a launch a step (`lfm.kernels.lstm`); auto: those in a step that is recorded, where launches
    cost nothing and the kernels run, else torch's library."""

    def __init__(self, input_size: int, hidden_size: int, *, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden_size, self.num_layers, self.dropout = hidden_size, num_layers, dropout
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            shapes = ((4 * hidden_size, width), (4 * hidden_size, hidden_size), (4 * hidden_size,), (4 * hidden_size,))
            for name, shape in zip(_names(layer), shapes, strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        *,
        state: tuple[Float[Tensor, "B L H"], Float[Tensor, "B L H"]] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Float[Tensor, "B T H"], tuple[Float[Tensor, "B L H"], Float[Tensor, "B L H"]]]:
        """Outputs, and `(h, c)` in at least fp32 after each row's last token.

        Without `state` each document (without `documents`, each row) starts from zeros.
        """
        assert state is None or documents is None
        B, T, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes, tokens, final = None, None, None
        packed = documents is not None and not documents.row_is_one_document
        if state is None and T > 1 and self._takes_steps(x):
            layers = [[self.get_parameter(name) for name in _names(layer)] for layer in range(self.num_layers)]
            starts = documents.starts if documents is not None and packed else None
            y, h, c = lstm_stack(x, layers, starts, dropout=self.dropout if self.training else 0.0)
            return y, (h, c)
        y = x.to(wide)
        if documents is not None and packed:
            tokens, sizes, final = pack_documents(documents.lengths, x.device)
            y = y.flatten(0, 1).index_select(0, tokens)
        sequences = B if sizes is None else int(sizes[0])
        # What cuDNN keeps for a backward pass; torch's modules take their training flag, and refuse gradients in eval.
        train = torch.is_grad_enabled()
        ends_h, ends_c = [], []
        # One layer a call, not all in one: cuDNN's own dropout between layers ignores torch's generator, so that an
        # interrupted run could not go on as the uninterrupted one would.
        for layer in range(self.num_layers):
            if layer > 0:
                y = F.dropout(y, self.dropout, self.training)
            if state is None:
                start = [y.new_zeros(1, sequences, self.hidden_size)] * 2
            else:
                start = [part[None, :, layer].to(wide).contiguous() for part in state]
            weights = self._weights(layer, wide)
            if T == 1:
                # For a single token oneDNN spends ten times the product's time on laying out the weights anew.
                h, c = (part[None] for part in torch.lstm_cell(y[:, 0], [part[0] for part in start], *weights))
                y = h[0][:, None]
            elif sizes is None:
                y, h, c = torch.lstm(y, start, weights, True, 1, 0.0, train, False, True)
            else:
                y, h, c = torch.lstm(y, sizes, start, weights, True, 1, 0.0, train, False)
            ends_h.append(h[0] if final is None else h[0, final])
            ends_c.append(c[0] if final is None else c[0, final])
        if tokens is not None:
            y = torch.empty_like(y).index_copy(0, tokens, y).unflatten(0, (B, T))
        return y.to(x.dtype), (torch.stack(ends_h, 1), torch.stack(ends_c, 1))

    def _takes_steps(self, x: Tensor) -> bool:
        if self.backend == "auto":
            return is_recording() and takes(x, self.hidden_size)
        return self.backend == "steps"

    def _weights(self, layer: int, dtype: torch.dtype) -> list[Tensor]:
        weights = [self.get_parameter(name) for name in _names(layer)]
        if not weights[0].is_cuda:
            return [weight.to(dtype) for weight in _in_order(weights)]
        # cuDNN wants a layer's weights in one piece of memory, in this order; so their gradients come in one piece too.
        whole = torch.cat([weight.flatten() for weight in weights]).to(dtype)
        parts = whole.split([weight.numel() for weight in weights])
        return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _in_order(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same, whose gradients come in the reverse order, however a row is computed.

    Packed and whole rows have graphs of their own, and the processes of ZeRO-2 and 3 add up gradients as they come.
    """
    ordered, after = [], torch.zeros(())
    for weight in weights:
        weight, after = _After.apply(weight, after)
        ordered.append(weight)
    return ordered


class _After(torch.autograd.Function):
    """A weight, which waits for the gradient of the next one; the second output is what the next one takes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return weight.view_as(weight), before.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return weight, before


def _names(layer: int) -> tuple[str, str, str, str]:
    return f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}"


def pack_documents(
    lengths: Lengths, device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " longest"], Int[Tensor, " B"]]:
    """Documents as independent sequences without padding, in the layout of torch's PackedSequence.

    Returns the index into the flattened rows of each packed token (first tokens of all documents, longest document
    first, then their second tokens, ...), the number of documents that have a t-th token (on the host), and the place
    of each row's last document among all.
    """
    flat = torch.tensor([length for row in lengths for length in row])
    rank = torch.empty_like(flat)
    rank[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat))
    position = torch.arange(int(flat.sum())) - (flat.cumsum(0) - flat).repeat_interleave(flat)
    tokens = (position * len(flat) + rank.repeat_interleave(flat)).argsort()
    last = torch.tensor([len(row) for row in lengths]).cumsum(0) - 1
    return (
        tokens.to(device, non_blocking=True),
        torch.bincount(position),
        rank[last].to(device, non_blocking=True),
    )


def lstm_cost(input_size: int, hidden_size: int) -> Cost:
    """Of one layer of a StackedLSTM."""
    gates = 4 * hidden_size
    return matrices(replicated=gates * (input_size + hidden_size)) + Cost(replicated=2 * gates)
