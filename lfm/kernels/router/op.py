"""`router_logits` and `choose_experts`: checks, the choice of path, and the closed-form gradients."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.gradient_sum import gradient_sum
from lfm.kernels.linear import sum_left_to_autograd
from lfm.kernels.router.reference import choose_experts_reference, router_logits_reference

_MOST_EXPERTS = 256
"""The kernels hold the logits of a block of tokens in registers."""


class RowMeans(NamedTuple):
    """Means over the tokens of rows; at least fp32."""

    probability: Tensor
    """`[..., E]`, of softmax(logits); carries gradients, as z does."""
    logit: Tensor
    """`[..., E]`."""
    z: Tensor
    """`[...]`, of logsumexp(logits)^2."""
    entropy: Tensor
    """`[...]`, of the probabilities, in nats."""


class Choice(NamedTuple):
    """Which experts the tokens of `[B, T, E]` logits go to, and what losses and records need."""

    experts: Tensor
    """int64 `[B, T, k]`, by falling logit + bias; of equal ones the first expert first.  A NaN counts as largest."""
    weights: Tensor
    """`[B, T, k]`, their probabilities over their sum, in which no bias is; at least fp32."""
    load: Tensor
    """int64 `[B, E]`, how many tokens of the row chose each expert."""
    means: Tensor
    """`[B, 2 E + 2]`, `row_means` in one piece, so that those of many routers are taken apart at once."""


def row_means(means: Tensor) -> RowMeans:
    """Of `Choice.means`, or of several on top of each other, `[..., B, 2 E + 2]`."""
    E = means.shape[-1] // 2 - 1
    probability, logit, z, entropy = means.split((E, E, 1, 1), dim=-1)
    return RowMeans(probability, logit.detach(), z[..., 0], entropy[..., 0].detach())


def router_logits(x: Tensor, weight: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """`x [..., D]` times `weight [E, D]` -> `[..., E]` in at least fp32, products and sums too; and x for its other
    uses, whose gradient then joins the logits' in one pass."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, x {list(x.shape)}; weight must be [E, {x.shape[-1]}]")
    # In fp32 the products would not be exact on tensor cores.
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and len(weight) <= _MOST_EXPERTS
    if (narrow or backend == "triton") and runs_triton(x, backend, _logits_comparison, *reversed(weight.shape)):
        return cast(tuple[Tensor, Tensor], _RouterLogits.apply(x, weight))
    return router_logits_reference(x, weight), x


def choose_experts(logits: Tensor, top_k: int, bias: Tensor | None = None, *, backend: Backend = "auto") -> Choice:
    """The `top_k` most probable of softmax(`logits [B, T, E]`), or those of the largest logit + `bias [E]`.

    Weights, and the probability and z of the means, are of the logits alone, and carry gradients to them; the bias gets
    none.
    """
    num_experts = logits.shape[-1]
    if logits.dim() != 3 or not 1 <= top_k <= num_experts:
        raise ValueError(f"logits has shape {list(logits.shape)}: no [B, T, E] with top_k={top_k} of E")
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"bias has shape {list(bias.shape)}; logits of {num_experts} experts take [{num_experts}]")
    held = num_experts <= _MOST_EXPERTS and logits.shape[1] > 0
    if held and runs_triton(logits, backend, _choice_comparison, num_experts, top_k):
        return Choice(*_ChooseExperts.apply(logits, top_k, bias))
    return Choice(*choose_experts_reference(logits, top_k, None if bias is None else bias.detach()))


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        from lfm.kernels.router.kernel import logits_forward

        ctx.set_materialize_grads(False)
        ctx.sum = gradient_sum(weight)
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return logits_forward(x, weight), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.router.kernel import logits_backward

        grad, grad_passed = (None if part is None else part.contiguous() for part in grad_outputs)
        if grad is None:
            return grad_passed, None
        x, weight = ctx.saved_tensors
        grad_x, shares = logits_backward(grad, grad_passed, x, weight)
        return grad_x, sum_left_to_autograd(ctx.sum, shares, weight.dtype) if ctx.needs_input_grad[1] else None


class _ChooseExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, bias: Tensor | None) -> tuple[Tensor, ...]:
        from lfm.kernels.router.kernel import choose_forward

        logits = logits.contiguous()
        bias = bias.contiguous() if bias is not None else None
        experts, weights, load, means = choose_forward(logits, top_k, bias)
        ctx.save_for_backward(logits, experts, weights)
        ctx.set_materialize_grads(False)  # or all four would have one
        ctx.mark_non_differentiable(experts, load)
        return experts, weights, load, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from lfm.kernels.router.kernel import choose_backward

        logits, experts, weights = ctx.saved_tensors
        grad_weights, grad_means = grad_outputs[1], grad_outputs[3]
        if grad_weights is None:
            grad_weights = torch.zeros_like(weights)
        if grad_means is None:
            B, _, E = logits.shape
            grad_means = logits.new_zeros(B, 2 * E + 2)
        return choose_backward(grad_weights.contiguous(), grad_means.contiguous(), logits, experts, weights), None, None


def _logits_comparison(
    device: torch.device, dtype: torch.dtype, D: int, num_experts: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, weight = (draw(seed, n, D, device=device, dtype=dtype) for seed, n in ((0, 40), (1, num_experts)))
    grad = draw(2, 40, num_experts, device=device, dtype=torch.float32)
    leaves, wide = [[part.requires_grad_() for part in (t(x), t(weight))] for t in (Tensor.detach, Tensor.float)]
    logits, passed = router_logits(leaves[0], leaves[1], backend="triton")
    want = router_logits_reference(wide[0], wide[1])
    yield "the logits", logits, want
    grad_passed = draw(3, 40, D, device=device, dtype=dtype)
    got = torch.autograd.grad([logits, passed], leaves, [grad, grad_passed])
    right = torch.autograd.grad([want, wide[0] * 1], wide, [grad, grad_passed.float()])
    pairs = zip(got, right, strict=True)
    yield from (("a gradient", *pair) for pair in pairs)


def _choice_comparison(
    device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    leaf = draw(0, 2, 40, num_experts, device=device, dtype=dtype).requires_grad_()
    wide = leaf.detach().float().requires_grad_()
    for said, bias in (("", None), (" with a bias", draw(5, num_experts, device=device, dtype=torch.float32))):
        got = choose_experts(leaf, top_k, bias, backend="triton")
        want = Choice(*choose_experts_reference(wide, top_k, bias))
        yield from zip((field + said for field in Choice._fields), got, want, strict=True)
        pairs = [[choice.weights, *row_means(choice.means)[::2]] for choice in (got, want)]
        grads = [draw(i, *x.shape, device=device, dtype=x.dtype) for i, x in enumerate(pairs[0])]
        (right,) = torch.autograd.grad(pairs[1], wide, [grad.float() for grad in grads])
        yield f"the gradient{said}", torch.autograd.grad(pairs[0], leaf, grads)[0], right
