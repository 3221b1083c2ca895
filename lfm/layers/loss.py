"""Cross entropy fused with the output projection, a chunk of tokens at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from lfm.kernels.cross_entropy import cross_entropy_, scaled
from lfm.layers.documents import IGNORED_LABEL

# Logits of one chunk: bounds the memory at 2 GiB of bf16 on a GPU, and stays near the cache on a CPU.  Every chunk
# after the first reads and writes the weight's whole gradient.
CHUNK_ELEMENTS = {"cuda": 2**30, "cpu": 2**24}


@dataclass(frozen=True)
class VocabularyShard:
    """This process's rows of an output projection whose vocabulary is cut over `group`."""

    group: dist.ProcessGroup
    first_id: int
    stored_rows: int
    """Of every process; the last ones may be padding, which no process multiplies."""


def linear_cross_entropy(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " n"],
    *,
    token_weights: Float[Tensor, " n"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
    shard: VocabularyShard | None = None,
) -> Float[Tensor, ""]:
    """Sum over labelled positions of -log softmax(hidden weight^T + bias)[label], in nats, at least fp32.

    Positions labelled IGNORED_LABEL count nothing; `token_weights`, at least fp32 and constants, multiply the others.
    Never holds [n, V]: gradients are formed with the logits.

    With `shard`, `weight` holds the rows of ids `first_id` on (V may be 0); the sum is the same on all processes, and
    each one's gradient of `hidden` is a summand.  Raises ValueError for `bias` with `shard`.
    """
    _refuse_cut_bias(bias, shard)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, bias, shard, torch.is_grad_enabled())


def linear_token_losses(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " n"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    shard: VocabularyShard | None = None,
) -> Float[Tensor, " n"]:
    """The summands of `linear_cross_entropy` by position, 0 where there is no label.

    For losses that are no plain sum of them: what each is multiplied by is known in backward alone, where the logits
    are made again, a chunk at a time.
    """
    _refuse_cut_bias(bias, shard)
    return _LinearTokenLosses.apply(hidden, weight, labels, bias, shard)


def _refuse_cut_bias(bias: Tensor | None, shard: VocabularyShard | None) -> None:
    if bias is not None and shard is not None:
        raise ValueError("an output projection with a bias has no vocabulary-parallel form; leave out bias or shard")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, bias, shard, needs_grad):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = needs_grad and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradients = _Gradients(hidden, weight, bias) if needs_grad else None
        for _, losses in _by_chunk(hidden, weight, labels, token_weights, bias, shard, gradients):
            total += losses.sum()
        saved = (gradients.hidden, gradients.weight, gradients.bias) if gradients is not None else (None, None, None)
        ctx.save_for_backward(*saved)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            scaled(grad_hidden, grad, grad_hidden.dtype),
            scaled(grad_weight, grad, ctx.weight_dtype),
            None,
            None,
            None if grad_bias is None else scaled(grad_bias, grad, ctx.weight_dtype),
            None,
            None,
        )


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, shard):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        for part, losses in _by_chunk(hidden, weight, labels, None, bias, shard, None):
            found[part] = losses
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.shard = shard
        return found

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight, labels, bias = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias)
        for _ in _by_chunk(hidden, weight, labels, grad, bias, ctx.shard, gradients):
            pass
        grad_bias = None if gradients.bias is None else gradients.bias.to(weight.dtype)
        return gradients.hidden, gradients.weight.to(weight.dtype), None, grad_bias, None


class _Gradients:
    """Of the output projection's inputs, a chunk of tokens added after the other; weights' at least in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.empty(weight.shape, dtype=wide, device=weight.device)
        self.bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None else None

    def add(self, part: slice, logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Of tokens `part`, whose `logits` are by now their gradients."""
        if self.bias is not None:
            self.bias += logits.sum(0)
        grad = logits.to(hidden.dtype)
        torch.mm(grad, weight, out=self.hidden[part])
        beta = 0 if part.start == 0 else 1  # 0: what the first chunk adds to is not read
        if grad.is_cuda and grad.dtype != self.weight.dtype:
            torch.addmm(self.weight, grad.T, hidden[part], beta=beta, out_dtype=self.weight.dtype, out=self.weight)
        else:
            self.weight.addmm_(grad.T.to(self.weight.dtype), hidden[part].to(self.weight.dtype), beta=beta)


def _by_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    bias: Tensor | None,
    shard: VocabularyShard | None,
    gradients: _Gradients | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The losses of one chunk of tokens after the other; their gradients are added to `gradients`, if given."""
    rows = len(weight) if shard is None else shard.stored_rows
    for chunk in torch.arange(len(hidden)).split(_chunk_tokens(hidden.device, rows)):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        logits = hidden[part] @ weight.T
        if bias is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).add_(bias)
        weights = token_weights[part] if token_weights is not None else None
        how = {"token_weights": weights, "gradient": gradients is not None}
        if shard is None:
            losses = cross_entropy_(logits, labels[part], **how)
        else:
            losses = _vocabulary_parallel_(logits, labels[part], shard, **how)
        if gradients is not None:
            gradients.add(part, logits, hidden, weight)
        yield part, losses


def _chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Whole tiles of a matrix product where there are some."""
    tokens = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    return tokens - tokens % 256 if tokens > 256 else tokens


def _vocabulary_parallel_(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, *, token_weights: Tensor | None, gradient: bool
) -> Tensor:
    """As `cross_entropy_`, of logits `[n, V]` whose columns are cut over the shard's group; the losses are the same on
    all processes."""
    n, V = logits.shape
    kept, label = labels != IGNORED_LABEL, labels - shard.first_id
    here = kept & (label >= 0) & (label < V)
    label = label.masked_fill(~here, 0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1) if V else wide.new_full((n,), -torch.inf)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    mine = wide.gather(1, label)[:, 0] * here if V else wide.new_zeros(n)
    sums = torch.stack([(wide - top[:, None]).exp().sum(-1), mine])
    dist.all_reduce(sums, group=shard.group)
    log_normalizer, label_logit = sums[0].log() + top, sums[1]
    if gradient and V:
        softmax = wide.sub_(log_normalizer[:, None]).exp_()
        softmax.scatter_add_(1, label, -here.to(wide.dtype)[:, None])
        softmax.mul_(kept[:, None])
        logits.copy_(softmax if token_weights is None else softmax.mul_(token_weights[:, None]))
    losses = (log_normalizer - label_logit) * kept
    return losses if token_weights is None else losses * token_weights
