"""Cross entropy fused with the output projection, a chunk of tokens at a time."""

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
    bias: Float[Tensor, " V"] | None = None,
    shard: VocabularyShard | None = None,
) -> Float[Tensor, ""]:
    """Sum over labelled positions of -log softmax(hidden weight^T + bias)[label], in nats, at least fp32.

    Positions labelled IGNORED_LABEL count nothing.  Never holds [n, V]: gradients are formed with the logits.

    With `shard`, `weight` holds the rows of ids `first_id` on (V may be 0); the sum is the same on all processes, and
    each one's gradient of `hidden` is a summand.  Raises ValueError for `bias` with `shard`.
    """
    if bias is not None and shard is not None:
        raise ValueError("an output projection with a bias has no vocabulary-parallel form; leave out bias or shard")
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, shard, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, shard, needs_grad):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = needs_grad and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if needs_grad else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if needs_grad and bias is not None else None
        rows = len(weight) if shard is None else shard.stored_rows
        for chunk in torch.arange(len(hidden)).split(_chunk_tokens(hidden.device, rows)):
            part = slice(int(chunk[0]), int(chunk[-1]) + 1)
            logits = hidden[part] @ weight.T
            if bias is not None:
                logits = logits.to(wide).add_(bias)
            if shard is None:
                losses = cross_entropy_(logits, labels[part], gradient=needs_grad)
            else:
                losses = _vocabulary_parallel_(logits, labels[part], shard, gradient=needs_grad)
            total += losses.sum()
            if grad_hidden is None or grad_weight is None:
                continue
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            grad = logits.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            beta = 0 if part.start == 0 else 1  # 0: what the first chunk adds to is not read
            if grad.is_cuda and grad.dtype != wide:
                torch.addmm(grad_weight, grad.T, hidden[part], beta=beta, out_dtype=wide, out=grad_weight)
            else:
                grad_weight.addmm_(grad.T.to(wide), hidden[part].to(wide), beta=beta)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            scaled(grad_hidden, grad, grad_hidden.dtype),
            scaled(grad_weight, grad, ctx.weight_dtype),
            None,
            None if grad_bias is None else scaled(grad_bias, grad, ctx.weight_dtype),
            None,
            None,
        )


def _chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Whole tiles of a matrix product where there are some."""
    tokens = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    return tokens - tokens % 256 if tokens > 256 else tokens


def _vocabulary_parallel_(logits: Tensor, labels: Tensor, shard: VocabularyShard, *, gradient: bool) -> Tensor:
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
        logits.copy_(softmax.mul_(kept[:, None]))
    return (log_normalizer - label_logit) * kept
