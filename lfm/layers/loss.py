"""Cross entropy fused with the output projection, a chunk of tokens at a time."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from lfm.layers.documents import IGNORED_LABEL

# Logits of one chunk: bounds the memory at 2 GiB of fp32 on a GPU, and stays near the cache on a CPU.
_CHUNK_ELEMENTS = {"cuda": 2**29, "cpu": 2**24}


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
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_grad else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if needs_grad and bias is not None else None
        rows = len(weight) if shard is None else shard.stored_rows
        for chunk in torch.arange(len(hidden)).split(max(1, _CHUNK_ELEMENTS[hidden.device.type] // rows)):
            part = slice(int(chunk[0]), int(chunk[-1]) + 1)
            kept = labels[part] != IGNORED_LABEL
            logits = (hidden[part] @ weight.T).to(wide)
            if bias is not None:
                logits += bias
            if shard is None:
                here, label = kept, labels[part].masked_fill(~kept, 0)[:, None]
                log_normalizer = logits.logsumexp(-1)
                label_logit = logits.gather(1, label)[:, 0]
            else:
                label = labels[part] - shard.first_id
                here = kept & (label >= 0) & (label < len(weight))
                label = label.masked_fill(~here, 0)[:, None]
                log_normalizer, label_logit = _vocabulary_parallel(logits, label, here, shard.group)
            total += ((log_normalizer - label_logit) * kept).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = logits.sub_(log_normalizer[:, None]).exp_()  # softmax, in place
            if len(weight):
                grad.scatter_add_(1, label, -here.to(wide)[:, None])
            grad = grad.mul_(kept[:, None])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad.is_cuda and grad.dtype != wide:
                torch.addmm(grad_weight, grad.T, hidden[part], out_dtype=wide, out=grad_weight)
            else:
                grad_weight.addmm_(grad.T.to(wide), hidden[part].to(wide))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None if grad_bias is None else (grad_bias * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, op=op, group=group)
    return x


def _vocabulary_parallel(
    logits: Tensor, label: Tensor, here: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log normalizer and label logit `[n]` of logits whose columns are cut over `group`."""
    n, V = logits.shape
    top = _reduced(logits.amax(-1) if V else logits.new_full((n,), -torch.inf), dist.ReduceOp.MAX, group)
    mine = logits.gather(1, label)[:, 0] * here if V else logits.new_zeros(n)
    sums = torch.stack([(logits - top[:, None]).exp().sum(-1), mine])
    normalizer, label_logit = _reduced(sums, dist.ReduceOp.SUM, group)
    return normalizer.log() + top, label_logit
