"""`cross_entropy_`, its two passes over a shard of the vocabulary, and `scaled`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.backend import Backend, draw, runs_triton
from lfm.kernels.cross_entropy.reference import (
    cross_entropy_reference_,
    scaled_reference,
    shard_gradient_reference_,
    shard_sums_reference,
)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    gradient: bool = True,
    bias: Tensor | None = None,
    padding: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """-log softmax(logits)[label] in nats, `[n]`, at least fp32, of `logits [n, V]` and int64 `labels [n]`.

    A position with a negative label counts nothing; `token_weights [n]`, at least fp32, multiply the losses.  With
    `gradient`, the logits are overwritten by the gradient of the losses' sum, (softmax(logits) - onehot(label)) times
    the weight, rounded once to their dtype; autograd does not see it.

    bias: `[V]`, added to each row in at least fp32; the gradient of its sum over rows is that of the logits.
    padding: elements of memory behind each row of logits that belong to nobody, and are left anyhow.  With them a row
    whose length is odd is read as fast as others.
    """
    _check(logits, labels)
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{logits.shape[1]}]")
    if padding < 0 or (len(logits) > 1 and padding > logits.stride(0) - logits.shape[1]):
        room = logits.stride(0) - logits.shape[1]
        raise ValueError(f"padding={padding} is more than the {room} elements between two rows of logits")
    if token_weights is not None and (token_weights.shape != labels.shape or token_weights.dtype.itemsize < 4):
        raise ValueError(
            f"token_weights is {token_weights.dtype} of shape {list(token_weights.shape)}; it must be at least "
            f"torch.float32 and {list(labels.shape)}"
        )
    if not runs_triton(logits, backend, _comparison, logits.shape[1]):
        return cross_entropy_reference_(logits, labels, gradient, token_weights, bias)
    from lfm.kernels.cross_entropy.kernel import cross_entropy_kernel_

    return cross_entropy_kernel_(logits, labels, gradient, token_weights, bias=bias, padding=padding)


def shard_sums(logits: Tensor, labels: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Of logits `[n, V]`, a shard of the vocabulary: `[n, 3]`, at least fp32, of each row the largest logit, the sum of
    exp(logit - largest), and the label's logit, 0 where the int64 `labels [n]`, counted from the shard's first column,
    point outside it."""
    _check(logits, labels)
    # A process may hold nothing but padding.
    if logits.shape[1] == 0 or not runs_triton(logits, backend, _shard_comparison, logits.shape[1]):
        return shard_sums_reference(logits, labels)
    from lfm.kernels.cross_entropy.kernel import shard_sums_kernel

    return shard_sums_kernel(logits, labels)


def joined_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The `shard_sums [shards, n, 3]` of all shards -> logarithm of the normalizer and the label's logit, `[n]` each.

    The order of the additions is that of the shards: whoever has the same sums gets the same bits.
    """
    top, total, label_logit = sums.unbind(-1)
    largest = top.amax(0)
    return largest + (total * (top - largest).exp()).sum(0).log(), label_logit.sum(0)


def shard_gradient_(
    logits: Tensor, labels: Tensor, log_normalizer: Tensor, factors: Tensor, *, backend: Backend = "auto"
) -> None:
    """Overwrite `logits [n, V]`, a shard of the vocabulary, by (exp(logit - log_normalizer) - onehot(label)) times the
    row's factor, rounded once; `labels` as for `shard_sums`, `log_normalizer` and `factors [n]` as it gives them."""
    _check(logits, labels)
    if logits.shape[1] == 0 or not runs_triton(logits, backend, _shard_comparison, logits.shape[1]):
        shard_gradient_reference_(logits, labels, log_normalizer, factors)
        return
    from lfm.kernels.cross_entropy.kernel import shard_gradient_kernel_

    shard_gradient_kernel_(logits, labels, log_normalizer, factors)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, labels is {labels.dtype} of shape {list(labels.shape)}; they must "
            "be [n, V] and torch.int64 [n]"
        )


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
    logits, bias = draw(2, 4, num_classes, device=device, dtype=dtype), draw(3, num_classes, device=device, dtype=dtype)
    wide = logits.to(torch.float32, copy=True)
    losses = cross_entropy_(logits, labels, bias=bias, backend="triton")
    yield "the losses with a bias", losses, cross_entropy_reference_(wide, labels, True, bias=bias)
    yield "the gradient with a bias", logits, wide


def _shard_comparison(
    device: torch.device, dtype: torch.dtype, num_classes: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    logits = draw(0, 4, num_classes, device=device, dtype=dtype)
    labels = torch.tensor([num_classes - 1, -100, num_classes, 0], device=device)
    factors = torch.tensor([1.0, 0.0, -0.3, 2.0], device=device)
    wide = logits.to(torch.float32, copy=True)
    sums, want = shard_sums(logits, labels, backend="triton"), shard_sums_reference(wide, labels)
    for i, name in enumerate(("largest logit", "normalizer", "label's logit")):
        yield f"the {name} of a shard", sums[:, i], want[:, i]
    log_normalizer, _ = joined_sums(torch.stack([want, want]))
    shard_gradient_(logits, labels, log_normalizer, factors, backend="triton")
    shard_gradient_reference_(wide, labels, log_normalizer, factors)
    yield "the gradient of a shard", logits, wide
