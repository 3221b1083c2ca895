"""`cross_entropy_` and `scaled`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.cross_entropy.reference import cross_entropy_reference_, scaled_reference


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    gradient: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """-log softmax(logits)[label] in nats, `[n]`, at least fp32, of `logits [n, V]` and int64 `labels [n]`.

    A position with a negative label counts nothing; `token_weights [n]`, at least fp32, multiply the losses.  With
    `gradient`, the logits are overwritten by the gradient of the losses' sum, (softmax(logits) - onehot(label)) times
    the weight, rounded once to their dtype; autograd does not see it.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, labels is {labels.dtype} of shape {list(labels.shape)}; they must "
            "be [n, V] and torch.int64 [n]"
        )
    if token_weights is not None and (token_weights.shape != labels.shape or token_weights.dtype.itemsize < 4):
        raise ValueError(
            f"token_weights is {token_weights.dtype} of shape {list(token_weights.shape)}; it must be at least "
            f"torch.float32 and {list(labels.shape)}"
        )
    if not runs_triton(logits, backend, _comparison, logits.shape[1]):
        return cross_entropy_reference_(logits, labels, gradient, token_weights)
    from lfm.kernels.cross_entropy.kernel import cross_entropy_kernel_

    return cross_entropy_kernel_(logits, labels, gradient, token_weights)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, *, backend: Backend = "auto") -> Tensor:
    """`x * factor`, a tensor of one number, in the wider dtype of the two, rounded to `dtype` as it is written."""
    if factor.numel() != 1:
        raise ValueError(f"factor has shape {list(factor.shape)}; it must be one number")
    narrow = x.is_contiguous() and torch.float64 not in (factor.dtype, dtype)
    if (narrow or backend == "triton") and runs_triton(x, backend, _scaled_comparison):
        from lfm.kernels.cross_entropy.kernel import scaled_kernel

        return scaled_kernel(x, factor, dtype)
    return scaled_reference(x, factor, dtype)


def _scaled_comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, factor = draw(0, 9001, device=device, dtype=dtype), torch.tensor(1 / 3, device=device)
    yield "the product", scaled(x, factor, torch.bfloat16, backend="triton"), x.float() * factor


def _comparison(device: torch.device, dtype: torch.dtype, num_classes: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    logits = draw(0, 4, num_classes, device=device, dtype=dtype)
    labels = torch.tensor([num_classes - 1, -100, 0, num_classes // 2], device=device)
    wide = logits.to(torch.float32, copy=True)
    weights = torch.tensor([1.0, 1.0, -0.3, 2.0], device=device)
    losses = cross_entropy_(logits, labels, token_weights=weights, backend="triton")
    yield "the losses", losses, cross_entropy_reference_(wide, labels, True, weights)
    yield "the gradient", logits, wide
