"""`gated_scan`: the choice of path and the closed-form gradient, which is written where the projection reads it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.diagonal_scan.op import best_path, module_of
from lfm.kernels.gated_scan.reference import gated_scan_reference


def gated_scan(
    projections: Tensor,
    bias: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    delta_min: float,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`scale sigmoid(gate) h` with h the `diagonal_scan` of value and delta, and its final state.

    projections: `[B, T, 3D]`, value, delta and gate side by side, as one product leaves them; the other arguments as of
    `diagonal_scan`.  The fused path takes rows without a state, computes the gate in fp32 and rounds once; the three
    gradients leave as one tensor.
    """
    D = projections.shape[-1] // 3
    fuses = state is None and torch.is_grad_enabled() and projections.requires_grad and D % 8 == 0
    if fuses and runs_triton(projections, backend, _comparison, D):
        return _GatedScan.apply(projections, bias, reset, delta_min, scale)  # pyright: ignore[reportReturnType]
    return gated_scan_reference(projections, bias, state, reset, delta_min, scale)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, bias: Tensor, reset: Tensor | None, delta_min: float, scale: float
    ) -> tuple[Tensor, Tensor]:
        from lfm.kernels.gated_scan.kernel import gate_forward

        ctx.set_materialize_grads(False)
        projections = projections.contiguous()
        value, delta, gate = projections.chunk(3, dim=-1)
        ctx.path, ctx.delta_min, ctx.scale = best_path(delta, value), delta_min, scale
        h, final = module_of(ctx.path).forward(delta, bias, value, None, reset, delta_min)
        h = h.contiguous()
        ctx.save_for_backward(projections, bias, reset, h)
        return gate_forward(gate, h, scale), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.gated_scan.kernel import gate_backward

        projections, bias, reset, h = ctx.saved_tensors
        value, delta, gate = projections.chunk(3, dim=-1)
        grads = torch.empty_like(projections)
        to_value, to_delta, to_gate = grads.chunk(3, dim=-1)
        grad, grad_final = grad_outputs
        grad = torch.zeros_like(h) if grad is None else grad.contiguous()
        grad_h = gate_backward(grad, gate, h, to_gate, ctx.scale)
        if grad_final is None:
            wide = torch.promote_types(h.dtype, torch.float32)
            grad_final = torch.zeros(h[:, 0].shape, dtype=wide, device=h.device)
        scan, given = module_of(ctx.path), (delta, bias, value, None, reset, h, grad_h, grad_final, ctx.delta_min)
        if ctx.path == "cuda":
            _, grad_bias, _, _ = scan.backward(*given, into=(to_delta, to_value))
        else:
            grad_delta, grad_bias, grad_value, _ = scan.backward(*given)
            to_delta.copy_(grad_delta)
            to_value.copy_(grad_value)
        return grads, grad_bias.to(bias.dtype), None, None, None


def _comparison(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    projections, bias = (
        draw(0, 3, 70, 3 * D, device=device, dtype=dtype),
        draw(1, D, device=device, dtype=torch.float32),
    )
    reset = draw(2, 3, 70, device=device, dtype=torch.float32) > 2
    leaves = [projections.requires_grad_(), (bias - 4).requires_grad_()]
    wide = [part.detach().float().requires_grad_() for part in leaves]
    how = {"delta_min": 1e-5, "scale": 0.3}
    got = gated_scan(leaves[0], leaves[1], None, reset, **how, backend="triton")
    want = gated_scan_reference(wide[0], wide[1], None, reset, **how)
    # In the dtype of what they are made from: the bias's gradient is fp32, of states that are rounded.
    yield from zip(("the gated states", "the final state"), (part.to(dtype) for part in got), want, strict=True)
    grads = [draw(3 + i, *part.shape, device=device, dtype=dtype) for i, part in enumerate(want)]
    right = torch.autograd.grad(want, wide, [grad.float() for grad in grads])
    mine = torch.autograd.grad(got, leaves, [grad.to(part.dtype) for grad, part in zip(grads, got, strict=True)])
    yield from (("a gradient", part.to(dtype), wanted) for part, wanted in zip(mine, right, strict=True))
