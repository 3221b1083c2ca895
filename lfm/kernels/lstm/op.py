"""`lstm_layer`: the choice of path and the closed-form gradient."""

from collections.abc import Iterator
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


def lstm_layer(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None = None,
    *,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer over rows `[B, T, I]` that begin from zero: outputs `[B, T, H]` in x's dtype, and the last h and c
    `[B, H]`, at least fp32, which carry no gradient.  Weights as torch.nn.LSTM has them, all of one dtype; reset: bool
    `[B, T]` or None, True where a document starts: nothing is carried into that position.

    The kernels multiply in x's dtype and add in fp32, in which what is in front of the gates, and c, stay; h and its
    gates' gradients are rounded, as they are multiplied.  With `gradient_sum`s weights and biases add up their own
    gradients, rounded to no narrower dtype.  A step is a launch: they are for a CUDA graph.
    """
    if backend != "triton":
        y, h, c = lstm_layer_reference(x, weight_ih, weight_hh, bias_ih, bias_hh, reset)
        return y, h.detach(), c.detach()
    y, h, c = _Layer.apply(x, weight_ih, weight_hh, bias_ih, bias_hh, reset)  # pyright: ignore[reportGeneralTypeIssues]
    return y, h, c


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lfm.kernels.lstm.kernel import forward_steps, inputs_product

        # What checkpointing hands to backward is a tensor without attributes.
        ctx.sums = [gradient_sum(weight) for weight in (weight_ih, weight_hh, bias_ih, bias_hh)]
        x, weight_hh = x.contiguous(), weight_hh.contiguous()
        reset = None if reset is None else reset.contiguous()
        z = inputs_product(x, weight_ih)
        h, c = forward_steps(z, weight_hh, bias_ih.float() + bias_hh.float(), reset)
        ctx.save_for_backward(x, weight_ih, weight_hh, reset, z, h, c)
        last_h, last_c = h[:, -1].to(torch.float32, copy=True), c[:, -1].clone()
        ctx.mark_non_differentiable(last_h, last_c)
        return h, last_h, last_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.lstm.kernel import backward_steps

        x, weight_ih, weight_hh, reset, z, h, c = ctx.saved_tensors
        grad_z = backward_steps(grad_outputs[0].contiguous(), z, c, weight_hh, reset).flatten(0, 1)
        grad_x = (grad_z @ weight_ih).view(x.shape) if ctx.needs_input_grad[0] else None
        before = F.pad(h[:, :-1], (0, 0, 1, 0))
        if reset is not None:
            before.masked_fill_(reset[..., None], 0)
        of_ih, of_hh, *of_biases = ctx.sums
        grad_ih, grad_hh = (
            _weight_gradient(found, grad_z, rows)
            for found, rows in ((of_ih, x.flatten(0, 1)), (of_hh, before.flatten(0, 1)))
        )
        biases = [sum_left_to_autograd(found, grad_z, grad_z.dtype) for found in of_biases]
        return grad_x, grad_ih, grad_hh, *biases, None


def _weight_gradient(found: GradientSum | None, grad: Tensor, rows: Tensor) -> Tensor | None:
    """`grad^T rows`, which goes to `found` if there is one."""
    if found is None:
        return grad.T @ rows
    found.put(lambda total, add: add_product_(total, grad, rows, add))
    return None


def _comparison(device: torch.device, dtype: torch.dtype, H: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    shapes = [(3, 5, 24), (4 * H, 24), (4 * H, H), (4 * H,), (4 * H,)]
    scales = [1.0, 24**-0.5, H**-0.5, 0.5, 0.5]
    given = [
        s * draw(i, *shape, device=device, dtype=torch.float32)
        for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]
    leaves = [part.to(dtype).requires_grad_() for part in given]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    reset = torch.zeros(3, 5, dtype=torch.bool, device=device)
    reset[1, 3] = True
    got, want = lstm_layer(*leaves, reset=reset), lstm_layer_reference(*wide, reset=reset)
    # The last h and c are wide, and as near as an h that is rounded between steps lets them be.
    yield from zip(("the outputs", "the last h", "the last c"), (part.to(dtype) for part in got), want, strict=True)
    grad = draw(9, 3, 5, H, device=device, dtype=dtype)
    right = torch.autograd.grad(want[0], wide, grad.float())
    yield from (("a gradient", *pair) for pair in zip(torch.autograd.grad(got[0], leaves, grad), right, strict=True))
