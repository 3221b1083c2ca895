"""`swiglu`: the choice of path and the closed-form gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.swiglu.reference import swiglu_reference


def swiglu(gate_up: Tensor, *, scale: float = 1.0, backend: Backend = "auto") -> Tensor:
    """`[..., 2F]`, gate first, -> `scale SiLU(gate) * up`, `[..., F]`, in the same dtype; the kernel computes in fp32.

    Raises ValueError for an odd last dimension.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; its last dimension must hold gate and up")
    fused = runs_triton(gate_up, backend, _comparison, gate_up.shape[-1])
    return _SwiGLU.apply(gate_up, scale) if fused else swiglu_reference(gate_up, scale)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: float) -> Tensor:
        from lfm.kernels.swiglu.kernel import swiglu_forward

        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.scale = scale
        return swiglu_forward(gate_up, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.swiglu.kernel import swiglu_backward

        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(grad_outputs[0].contiguous(), gate_up, ctx.scale), None


def _comparison(device: torch.device, dtype: torch.dtype, width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    gate_up, grad = draw(0, 40, width, device=device, dtype=dtype), draw(1, 40, width // 2, device=device, dtype=dtype)
    leaf, wide = gate_up.requires_grad_(), gate_up.detach().float().requires_grad_()
    y, want = swiglu(leaf, scale=0.3, backend="triton"), swiglu_reference(wide, 0.3)
    yield "y", y, want
    (right,) = torch.autograd.grad(want, wide, grad.float())
    yield "the gradient", torch.autograd.grad(y, leaf, grad)[0], right
