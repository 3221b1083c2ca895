"""Cross entropy fused with the output projection, a chunk of tokens at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.kernels.accumulation import accumulate_
from lfm.kernels.cross_entropy import cross_entropy_, joined_sums, scaled, shard_gradient_, shard_sums
from lfm.kernels.gradient_sum import GradientSum, gradient_sum
from lfm.kernels.linear import add_product_
from lfm.layers.documents import IGNORED_LABEL

# Logits of one chunk: bounds the memory at 2 GiB of bf16 on a GPU, and stays near the cache on a CPU.  Every chunk
# after the first reads and writes the weight's whole gradient.
CHUNK_ELEMENTS = {"cuda": 2**30, "cpu": 2**24}

ROW_ALIGNMENT = 64
"""Elements: 128 bytes of bf16."""


@dataclass(frozen=True)
class VocabularyShard:
    """This process's rows of an output projection whose vocabulary is cut over `group`."""

    group: dist.ProcessGroup
    first_id: int
    stored_rows: int
    """Of every process; the last ones may be padding, which no process multiplies."""


def linear_cross_entropy(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "rows D"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int | None = None,
    token_weights: Float[Tensor, " n"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
    shard: VocabularyShard | None = None,
) -> Float[Tensor, ""]:
    """Sum over labelled positions of -log softmax(hidden weight^T + bias)[label], in nats, at least fp32.

    Positions labelled IGNORED_LABEL count nothing; `token_weights`, at least fp32 and constants, multiply the others.
    Rows of the weight past `num_classes` (None: all are classes) are padding, without logits and gradients.
    Never holds [n, V]: gradients are formed with the logits.  That of a weight that has a `gradient_sum` is at least
    fp32 all the way.

    With `shard`, `weight` holds the rows of ids `first_id` on (num_classes may be 0); the sum is the same on all
    processes, and each one's gradient of `hidden` is a summand.  Raises ValueError for `bias` with `shard`.
    """
    _refuse_cut_bias(bias, shard)
    V = len(weight) if num_classes is None else num_classes
    return _LinearCrossEntropy.apply(hidden, weight, labels, V, token_weights, bias, shard, torch.is_grad_enabled())


def linear_token_losses(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "rows D"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int | None = None,
    bias: Float[Tensor, " V"] | None = None,
    shard: VocabularyShard | None = None,
) -> Float[Tensor, " n"]:
    """The summands of `linear_cross_entropy` by position, 0 where there is no label.

    For losses that are no plain sum of them: what each is multiplied by is known in backward alone, where the logits
    are made again, a chunk at a time.
    """
    _refuse_cut_bias(bias, shard)
    V = len(weight) if num_classes is None else num_classes
    return _LinearTokenLosses.apply(hidden, weight, labels, V, bias, shard)


def _refuse_cut_bias(bias: Tensor | None, shard: VocabularyShard | None) -> None:
    if bias is not None and shard is not None:
        raise ValueError("an output projection with a bias has no vocabulary-parallel form; leave out bias or shard")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, num_classes, token_weights, bias, shard, needs_grad):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = needs_grad and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        sums = _sums(weight, bias)
        waits = sums[0] is not None and sums[0].later is not None
        gradients = _Gradients(hidden, weight, num_classes, bias, weight_waits=waits) if needs_grad else None
        for _, losses in _by_chunk(hidden, weight[:num_classes], labels, token_weights, bias, shard, gradients):
            total += losses.sum()
        saved = (gradients.hidden, gradients.weight, gradients.bias) if gradients is not None else (None, None, None)
        ctx.save_for_backward(*saved)
        ctx.weight_dtype, ctx.sums, ctx.put_off = weight.dtype, sums, gradients if waits else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        grad_hidden = scaled(grad_hidden, grad, grad_hidden.dtype)
        if ctx.put_off is not None:
            put_off, ctx.put_off = ctx.put_off, None
            ctx.sums[0].put(lambda total, add: accumulate_(total, put_off.make_weight(), factor=grad, add=add))
        parts = zip((grad_weight, grad_bias), ctx.sums, strict=True)
        grad_weight, grad_bias = (_left_to_autograd(part, grad, found, ctx.weight_dtype) for part, found in parts)
        return grad_hidden, grad_weight, None, None, None, grad_bias, None, None


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, num_classes, bias, shard):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        for part, losses in _by_chunk(hidden, weight[:num_classes], labels, None, bias, shard, None):
            found[part] = losses
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.num_classes, ctx.shard, ctx.sums = num_classes, shard, _sums(weight, bias)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight, labels, bias = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, ctx.num_classes, bias)
        for _ in _by_chunk(hidden, weight[: ctx.num_classes], labels, grad, bias, ctx.shard, gradients):
            pass
        parts = zip((gradients.weight, gradients.bias), ctx.sums, strict=True)
        grad_weight, grad_bias = (_left_to_autograd(part, None, found, weight.dtype) for part, found in parts)
        return gradients.hidden, grad_weight, None, None, grad_bias, None


def _sums(weight: Tensor, bias: Tensor | None) -> tuple[GradientSum | None, GradientSum | None]:
    """Of those that have one and are trained."""
    found = (gradient_sum(x) if x is not None and x.requires_grad else None for x in (weight, bias))
    return next(found), next(found)


def _left_to_autograd(
    gradient: Tensor | None, factor: Tensor | None, found: GradientSum | None, dtype: torch.dtype
) -> Tensor | None:
    """`gradient` times `factor` in `dtype`; None where it went to its sum, in one pass over both."""
    if gradient is None:
        return None
    if found is not None:
        found.add(gradient, factor=factor)
        return None
    return gradient.to(dtype) if factor is None else scaled(gradient, factor, dtype)


class _Gradients:
    """Of the output projection's inputs, a chunk of tokens added after the other; weights' at least in fp32."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, num_classes: int, bias: Tensor | None, *, weight_waits: bool = False
    ) -> None:
        """`weight_waits`: the weight's is made by `make_weight` alone; until then the logits are kept."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden)
        self._shape, self._dtype, self._num_classes = weight.shape, wide, num_classes
        self._kept: list[tuple[Tensor, Tensor]] | None = [] if weight_waits else None
        self.weight = None if weight_waits else self._blank_weight(weight.device)
        self.bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None else None

    def _blank_weight(self, device: torch.device) -> Tensor:
        """Zero for what is no class; the rest is written by the first chunk."""
        weight = torch.empty(self._shape, dtype=self._dtype, device=device)
        weight[self._num_classes :].zero_()
        return weight

    def make_weight(self) -> Tensor:
        """The weight's gradient, of what was kept; once."""
        assert self._kept is not None
        weight = self._blank_weight(self.hidden.device)
        for i, (grad, hidden) in enumerate(self._kept):
            _add_by_classes(weight, grad, hidden, i > 0)
        self._kept.clear()
        return weight

    def add(self, part: slice, logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Of tokens `part`, whose `logits` are by now their gradients."""
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self._dtype)
        grad = logits.to(hidden.dtype)
        _product_of_classes(grad, weight, out=self.hidden[part])
        if self.weight is None:
            assert self._kept is not None
            self._kept.append((grad, hidden[part]))
        else:
            _add_by_classes(self.weight, grad, hidden[part], part.start > 0)


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
    size = _chunk_tokens(hidden.device, rows)
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        logits, padding = _logits(hidden[part], weight)
        given = bias if hidden.is_cuda else None  # else added here: a CPU's logits are not read once more for it
        if bias is not None and given is None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).add_(bias)
        weights = token_weights[part] if token_weights is not None else None
        how = {"token_weights": weights, "gradient": gradients is not None}
        if shard is None:
            losses = cross_entropy_(logits, labels[part], bias=given, padding=padding, **how)
        else:
            losses = _vocabulary_parallel_(logits, labels[part], shard, **how)
        if gradients is not None:
            gradients.add(part, logits, hidden, weight)
        yield part, losses


def _logits(hidden: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """`hidden weight^T`, and how many elements lie behind each row of it.

    On a GPU rows begin where matrix units can fetch them, and the last few classes are a product of their own: 50,257
    columns at once would be multiplied several times slower, here and in the backward pass.
    """
    n, V = len(hidden), len(weight)
    padding = -V % ROW_ALIGNMENT
    if not hidden.is_cuda or padding == 0:
        return hidden @ weight.T, 0
    rows, most = hidden.new_empty(n, V + padding), _most_classes(V)
    torch.mm(hidden, weight[:most].T, out=rows[:, :most])
    if most < V:
        rows[:, most:V] = hidden @ weight[most:].T
    return rows[:, :V], padding


def _product_of_classes(grad: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """`out = grad weight`, of `grad [n, V]`; rounded once, but for what the last few classes give."""
    most = _most_classes(len(weight))
    if not grad.is_cuda or most in (0, len(weight)):
        torch.mm(grad, weight, out=out)
        return
    torch.mm(grad[:, most:], weight[most:], out=out)
    out.addmm_(grad[:, :most], weight[:most])


def _add_by_classes(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:
    """`grad^T hidden` into the first rows of `total`, or added to them where `add`, of `grad [n, V]`."""
    V = grad.shape[1]
    most = _most_classes(V) if grad.is_cuda else V
    for first, end in ((0, most), (most, V)):
        if first < end:
            add_product_(total[first:end], grad[:, first:end], hidden, add)


def _most_classes(num_classes: int) -> int:
    """As many as matrix units take eight at a time."""
    return num_classes - num_classes % 8


def _chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Whole tiles of a matrix product where there are some."""
    tokens = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    return tokens - tokens % 256 if tokens > 256 else tokens


def _vocabulary_parallel_(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, *, token_weights: Tensor | None, gradient: bool
) -> Tensor:
    """As `cross_entropy_`, of logits `[n, V]` whose columns are cut over the shard's group; the losses are the same on
    all processes."""
    # One without a label is in no shard.
    own = labels - shard.first_id
    sums = shard_sums(logits, own)
    of_all = sums.new_empty(shard.group.size() * len(sums), 3)
    dist.all_gather_into_tensor(of_all, sums.contiguous(), group=shard.group)
    log_normalizer, label_logit = joined_sums(of_all.view(-1, *sums.shape))
    factors = sums.new_ones(len(labels)) if token_weights is None else token_weights
    factors = factors.masked_fill(labels == IGNORED_LABEL, 0)
    if gradient:
        shard_gradient_(logits, own, log_normalizer, factors)
    return (log_normalizer - label_logit) * factors
