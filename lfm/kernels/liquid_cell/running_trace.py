"""The trace of one plastic synapse while it is read and changed token by token: plain PyTorch."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

TraceMode = Literal["per_sequence", "batch_mean"]

FACTORS = 16
"""Outer products that a running trace holds before it adds them up: more cost time, fewer cost memory."""


@dataclass(frozen=True)
class TraceRule:
    """How the trace of one synapse acts and changes; in at least fp32, but for alpha."""

    alpha: Float[Tensor, "D D"]
    """In the dtype of the weights."""
    eta: Float[Tensor, " 1"]
    decay: Float[Tensor, " 1"]
    largest: Float[Tensor, ""]
    """Frobenius norm at which the trace is held."""
    mode: TraceMode
    """Grow by the outer products of each sequence, or by their mean over the batch."""
    differentiable: bool


class RunningTrace:
    """The trace M of one synapse while tokens are read.

        M <- decay M + eta post pre^T, then scaled down to the norm `rule.largest` if it is longer

    Autograd would keep several matrices a sequence and token.  So the last tokens' terms stay outer products,
    `M = c M_0 + sum_k w_k post_k pre_k^T`, with the norm of M from scalar products, and

        (alpha * M) u = c (alpha * M_0) u + sum_k w_k post_k * (alpha (pre_k * u))
    """

    def __init__(self, rule: TraceRule, trace: Float[Tensor, "B D D"]) -> None:
        self._rule, self._alpha = rule, rule.alpha.to(trace.dtype)
        self._begin(trace)

    def _begin(self, trace: Tensor) -> None:
        B, D, _ = trace.shape
        self._start, self._products = trace, _Products(self._alpha, trace)
        # Not kept in the products, which autograd's nodes refer to: memory would wait for the garbage collector.
        self._handle = _Open.apply(self._alpha, trace, self._products)
        self._scale = trace.new_ones(B, 1)
        self._squared_norm = trace.square().sum((1, 2))[:, None]
        self._weights = trace.new_zeros(B, 0)
        self._post = self._weighted_post = self._pre = trace.new_zeros(B, 0, D)

    def times(self, u: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """`(alpha * M) u`."""
        y = self._scale * _Apply.apply(self._handle, u, self._products)
        if self._pre.shape[1]:
            y = y + (self._weighted_post * F.linear(self._pre * u[:, None], self._alpha)).sum(1)
        return y

    def update(self, post: Float[Tensor, "B D"], pre: Float[Tensor, "B D"]) -> None:
        """Read one more token."""
        with torch.set_grad_enabled(self._rule.differentiable and torch.is_grad_enabled()):
            trace = self._grown(post, pre)
        if trace is not None:
            self._begin(trace)

    def forget(self, fresh: Bool[Tensor, " B"]) -> None:
        """Set the traces of these sequences to zero."""
        fresh = fresh[:, None]
        self._scale, self._squared_norm, self._weights, self._weighted_post = (
            x.masked_fill(fresh if x.dim() == 2 else fresh[..., None], 0)
            for x in (self._scale, self._squared_norm, self._weights, self._weighted_post)
        )

    def value(self) -> Float[Tensor, "B D D"]:
        return self._scale[..., None] * self._start + self._weighted_post.mT @ self._pre

    def _grown(self, post: Tensor, pre: Tensor) -> Tensor | None:
        """The whole trace when it holds enough outer products, else None."""
        if self._rule.mode == "batch_mean":
            return grown_by_mean(self._rule, self.value(), post, pre)
        eta, decay = self._rule.eta, self._rule.decay
        overlap = self._scale * (post * _times(self._start, pre)).sum(-1, keepdim=True)
        both = _times(self._post, post) * _times(self._pre, pre)
        overlap = overlap + (self._weights * both).sum(-1, keepdim=True)  # post^T M pre
        added = eta.square() * post.square().sum(-1, keepdim=True) * pre.square().sum(-1, keepdim=True)
        squared_norm = decay.square() * self._squared_norm + 2 * decay * eta * overlap + added
        factor = held(self._rule, squared_norm)
        self._squared_norm = factor.square() * squared_norm
        self._scale = factor * decay * self._scale
        self._weights = torch.cat((factor * decay * self._weights, factor * eta), 1)
        self._post = torch.cat((self._post, post[:, None]), 1)
        self._pre = torch.cat((self._pre, pre[:, None]), 1)
        self._weighted_post = self._weights[..., None] * self._post
        return self.value() if self._pre.shape[1] == FACTORS else None


def grown_by_mean(
    rule: TraceRule, trace: Float[Tensor, "... D D"], post: Float[Tensor, "B D"], pre: Float[Tensor, "B D"]
) -> Float[Tensor, "... D D"]:
    """Traces after a token that adds the mean of the batch's outer products to all of them."""
    trace = rule.decay * trace + rule.eta / len(post) * (post.T @ pre)
    return held(rule, trace.square().sum((-2, -1), keepdim=True)) * trace


def held(rule: TraceRule, squared_norm: Tensor) -> Tensor:
    """The factor that brings a norm back to the largest."""
    exceeds = squared_norm > rule.largest.square()
    # 1 elsewhere: the square root of 0 has no gradient.
    norm = torch.where(exceeds, squared_norm, 1.0).sqrt()
    return torch.where(exceeds, rule.largest / (norm + 1e-8), 1.0)


class _Products:
    """What `(alpha * M) u` for many u share.

    The gradient of the matrices, an outer product for each u, is formed for all of them at once: each product leaves
    its vectors here, and autograd calls `_Open` when it has been through all of them.
    """

    def __init__(self, alpha: Tensor, trace: Tensor) -> None:
        self.matrix = (alpha * trace).detach()
        self.vectors: list[tuple[Tensor, Tensor]] = []
        """(gradient of the product, u), collected in backward."""


class _Open(torch.autograd.Function):
    """An empty tensor, by which autograd knows that the products depend on alpha and the trace."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, trace: Tensor, products: _Products) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(alpha, trace)
        ctx.products = products
        return alpha.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor):  # type: ignore[override]
        alpha, trace = ctx.saved_tensors
        grads, inputs = zip(*ctx.products.vectors, strict=True)
        ctx.products.vectors.clear()
        outer = torch.stack(grads, 2) @ torch.stack(inputs, 1)
        needs_alpha, needs_trace, _ = ctx.needs_input_grad
        return (outer * trace).sum(0) if needs_alpha else None, outer * alpha if needs_trace else None, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, u: Tensor, products: _Products) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(u)
        ctx.products = products
        return _times(products.matrix, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        needs_matrix, needs_u, _ = ctx.needs_input_grad
        if needs_matrix:
            ctx.products.vectors.append((grad, ctx.saved_tensors[0]))
        grad_u = _times(ctx.products.matrix.mT, grad) if needs_u else None
        return grad.new_empty(0) if needs_matrix else None, grad_u, None


def _times(matrices: Float[Tensor, "B n D"], vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B n"]:
    # As rows: columns take a CPU seven times as long.
    return torch.bmm(vectors[:, None], matrices.mT)[:, 0]
