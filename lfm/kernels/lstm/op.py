"""`lstm_stack`: the choice of path, the order of steps of several layers, and the closed-form gradient."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.gradient_sum import GradientSum, gradient_sum
from lfm.kernels.linear import add_product_, sum_left_to_autograd
from lfm.kernels.lstm.reference import lstm_layer_reference

HIDDEN_SIZES = 16
"""Those that this divides."""


def takes(x: Tensor, hidden_size: int) -> bool:
    """Whether the kernels run on such inputs: in 16 bits on a GPU, where they were seen to be right."""
    if x.dtype.itemsize != 2 or hidden_size % HIDDEN_SIZES:
        return False
    return runs_triton(x, "auto", _comparison, hidden_size)


def lstm_stack(
    x: Tensor,
    layers: Sequence[Sequence[Tensor]],
    reset: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """Layers over rows `[B, T, I]` that begin from zero: the last one's outputs `[B, T, H]` in x's dtype, and the last
    h and c of each, `[B, L, H]`, at least fp32, which carry no gradient.

    layers: of each weight_ih, weight_hh, bias_ih and bias_hh, as torch.nn.LSTM has them, all of one dtype; reset: bool
    `[B, T]` or None, True where a document starts: nothing is carried into that position.  dropout: share of what goes
    from a layer to the next that is left out, and the rest is scaled up.

    The kernels multiply in x's dtype and add in fp32, in which what is in front of the gates, and c, stay; h and its
    gates' gradients are rounded, as they are multiplied.  With `gradient_sum`s weights and biases add up their own
    gradients, rounded to no narrower dtype.  A step is a launch: they are for a CUDA graph.
    """
    flat = [weight for layer in layers for weight in layer]
    if backend != "triton":
        h, c = [], []
        for number, layer in enumerate(layers):
            if number > 0:
                x = F.dropout(x, dropout)
            x, *ends = lstm_layer_reference(x, *layer, reset=reset)
            h.append(ends[0].detach())
            c.append(ends[1].detach())
        return x, torch.stack(h, 1), torch.stack(c, 1)
    y, h, c = _Stack.apply(x, reset, dropout, *flat)  # pyright: ignore[reportGeneralTypeIssues]
    return y, h, c


class _Pieces:
    """The order of pieces, each of SHORTEST steps or more, of all layers: a layer's piece needs the one before it and
    that of the layer below, so layers work at once, each on a stream of its own, on pieces that follow each other.

    On a GPU whatever one stream makes and another reads is to be kept until `join`: memory is given out anew by stream.
    """

    def __init__(self, device: torch.device, layers: int, pieces: int) -> None:
        self.layers, self.pieces, self.kept = layers, pieces, []
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda" and layers > 1 and pieces > 1:
            self._streams = _streams(device, layers)
            self._here = torch.cuda.current_stream(device)
            for stream in self._streams:
                stream.wait_stream(self._here)
        self._done: dict[tuple[int, int], torch.cuda.Event] = {}

    def forward(self) -> Iterator[tuple[int, int]]:
        """Layer and piece; what the body launches goes to the layer's stream, behind what the layer below launched."""
        for both in range(self.layers + self.pieces - 1):
            for layer in range(self.layers):
                if 0 <= both - layer < self.pieces:
                    yield from self._one(layer, both - layer, layer - 1)

    def backward(self) -> Iterator[tuple[int, int]]:
        """In the reverse order."""
        for both in reversed(range(self.layers + self.pieces - 1)):
            for layer in reversed(range(self.layers)):
                if 0 <= both - layer < self.pieces:
                    yield from self._one(layer, both - layer, layer + 1)

    def _one(self, layer: int, piece: int, needs: int) -> Iterator[tuple[int, int]]:
        if not self._streams:
            yield layer, piece
            return
        stream = self._streams[layer]
        if (needs, piece) in self._done:
            stream.wait_event(self._done[needs, piece])
        with torch.cuda.stream(stream):
            yield layer, piece
            self._done[layer, piece] = event = torch.cuda.Event()
            event.record(stream)

    def join(self) -> None:
        for stream in self._streams:
            self._here.wait_stream(stream)
        self.kept.clear()


@functools.cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


SHORTEST = 32
"""Steps of a piece."""


def _num_pieces(steps: int, layers: int) -> int:
    return steps // SHORTEST if layers > 1 and steps % SHORTEST == 0 else 1


class _Stack(torch.autograd.Function):
    """Tensors of steps are kept by pieces, `[pieces, B, S, ...]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, reset: Tensor | None, dropout: float, *flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lfm.kernels.lstm.kernel import Steps, forward_steps, inputs_product

        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums = [gradient_sum(weight) for weight in flat]
        L, (B, T, _), H = len(flat) // 4, x.shape, flat[1].shape[1]
        pieces, S = _num_pieces(T, L), T // _num_pieces(T, L)
        resets = None if reset is None else _in_pieces(reset, pieces)
        h = x.new_empty(L, pieces, B, S, H)
        c = x.new_empty(L, pieces, B, S, H, dtype=torch.float32)
        num_keeps = L - 1 if dropout > 0 else 0
        keeps = [x.new_empty(pieces, B, S, H, dtype=torch.bool).bernoulli_(1 - dropout) for _ in range(num_keeps)]
        inputs = [_in_pieces(x, pieces), *(torch.empty_like(h[0]) if dropout > 0 else h[i] for i in range(L - 1))]
        biases = [flat[4 * i + 2].float() + flat[4 * i + 3].float() for i in range(L)]
        matrices = [flat[4 * i + 1].contiguous() for i in range(L)]
        steps: dict[tuple[int, int], Steps] = {}
        order = _Pieces(x.device, L, pieces)
        for i, piece in order.forward():
            if i > 0 and dropout > 0:
                torch.mul(h[i - 1, piece], keeps[i - 1][piece], out=inputs[i][piece]).mul_(1 / (1 - dropout))
            z = inputs_product(inputs[i][piece], flat[4 * i])
            given = None if resets is None else resets[piece]
            steps[i, piece] = Steps(z, h[i, piece], c[i, piece], given)
            forward_steps(steps[i, piece], steps.get((i, piece - 1)), matrices[i], biases[i])
        order.join()
        z = [steps[i, piece].z for i in range(L) for piece in range(pieces)]
        ctx.save_for_backward(*flat, *inputs, *keeps, resets, h, c, *z)
        ctx.sizes = L, pieces, dropout
        last_h, last_c = (part[:, -1, :, -1].transpose(0, 1).to(torch.float32, copy=True) for part in (h, c))
        ctx.mark_non_differentiable(last_h, last_c)
        return _in_rows(h[-1]), last_h, last_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.lstm.kernel import Steps, backward_steps

        L, pieces, dropout = ctx.sizes
        saved = list(ctx.saved_tensors)
        flat, saved = saved[: 4 * L], saved[4 * L :]
        inputs, saved = saved[:L], saved[L:]
        num_keeps = L - 1 if dropout > 0 else 0
        keeps, (resets, h, c, *z) = saved[:num_keeps], saved[num_keeps:]
        grad_y = _in_pieces(grad_outputs[0], pieces)
        grad_z = h.new_empty(*h.shape[:-1], 4 * h.shape[-1])
        grad_c = c.new_empty(L, *c[0, 0, :, 0].shape)
        grad_x = torch.empty_like(inputs[0]) if ctx.needs_input_grad[0] else None
        turned = [flat[4 * i + 1].T.contiguous() for i in range(L)]
        steps = {
            (i, piece): Steps(
                z[i * pieces + piece], h[i, piece], c[i, piece], None if resets is None else resets[piece],
                grad_z[i, piece],
            )
            for i in range(L) for piece in range(pieces)
        }  # fmt: skip
        given: dict[tuple[int, int], Tensor] = {(L - 1, piece): grad_y[piece] for piece in range(pieces)}
        order = _Pieces(h.device, L, pieces)
        for i, piece in order.backward():
            own, before, after = (steps.get((i, piece + step)) for step in (0, -1, 1))
            assert own is not None and own.grad_z is not None
            backward_steps(own, before, after, given[i, piece], grad_c[i], turned[i])
            if i == 0:
                if grad_x is not None:
                    torch.mm(own.grad_z.flatten(0, 1), flat[0], out=grad_x[piece].flatten(0, 1))
                continue
            below = (own.grad_z.flatten(0, 1) @ flat[4 * i]).view_as(own.h)
            if dropout > 0:
                below = below.mul_(keeps[i - 1][piece]).mul_(1 / (1 - dropout))
            given[i - 1, piece] = below
            order.kept.append(below)
        order.join()
        given.clear()
        gradients: list[Tensor | None] = [None] * len(flat)
        for i in reversed(range(L)):
            grad, (of_ih, of_hh, *of_biases) = grad_z[i].flatten(0, 2), ctx.sums[4 * i : 4 * i + 4]
            before = torch.empty_like(h[i])
            before[:, :, 1:], before[1:, :, 0] = h[i][:, :, :-1], h[i][:-1, :, -1]
            before[0, :, 0] = 0
            if resets is not None:
                before.masked_fill_(resets[..., None], 0)
            gradients[4 * i] = _weight_gradient(of_ih, grad, inputs[i].flatten(0, 2))
            gradients[4 * i + 1] = _weight_gradient(of_hh, grad, before.flatten(0, 2))
            for place, found in zip((4 * i + 2, 4 * i + 3), of_biases, strict=True):
                gradients[place] = sum_left_to_autograd(found, grad, grad.dtype)
        return None if grad_x is None else _in_rows(grad_x), None, None, *gradients


def _in_pieces(x: Tensor, pieces: int) -> Tensor:
    """`[B, T, ...]` -> `[pieces, B, T / pieces, ...]`."""
    return x.unflatten(1, (pieces, -1)).transpose(0, 1).contiguous()


def _in_rows(x: Tensor) -> Tensor:
    """The reverse."""
    return x.transpose(0, 1).flatten(1, 2)


def _weight_gradient(found: GradientSum | None, grad: Tensor, rows: Tensor) -> Tensor | None:
    """`grad^T rows`, which goes to `found` if there is one."""
    if found is None:
        return grad.T @ rows
    found.put(lambda total, add: add_product_(total, grad, rows, add))
    return None


def _comparison(device: torch.device, dtype: torch.dtype, H: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of two layers and two pieces."""
    T = 2 * SHORTEST
    shapes, scales = [(3, T, 24)], [1.0]
    for width in (24, H):
        shapes += [(4 * H, width), (4 * H, H), (4 * H,), (4 * H,)]
        scales += [width**-0.5, H**-0.5, 0.5, 0.5]
    given = [
        s * draw(i, *shape, device=device, dtype=torch.float32)
        for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]
    leaves = [part.to(dtype).requires_grad_() for part in given]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    reset = torch.zeros(3, T, dtype=torch.bool, device=device)
    reset[1, 3] = True
    got = lstm_stack(leaves[0], [leaves[1:5], leaves[5:]], reset)
    want = lstm_stack(wide[0], [wide[1:5], wide[5:]], reset, backend="reference")
    # The last h and c are wide, and as near as an h that is rounded between steps lets them be.
    yield from zip(("the outputs", "the last h", "the last c"), (part.to(dtype) for part in got), want, strict=True)
    grad = draw(9, 3, T, H, device=device, dtype=dtype)
    right = torch.autograd.grad(want[0], wide, grad.float())
    yield from (("a gradient", *pair) for pair in zip(torch.autograd.grad(got[0], leaves, grad), right, strict=True))
