"""Cross entropy fused with the output projection, a chunk of tokens at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.layers.documents import IGNORED_LABEL

# Logits of one chunk: bounds the memory at 2 GiB of fp32 on a GPU, and stays near the cache on a CPU.
_CHUNK_ELEMENTS = {"cuda": 2**29, "cpu": 2**24}


def linear_cross_entropy(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Sum over labelled positions of -log softmax(hidden weight^T)[label], in nats, at least fp32.

    Positions labelled IGNORED_LABEL count nothing.  Never holds [n, V]: gradients are formed with the logits.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_grad):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = needs_grad and (hidden.requires_grad or weight.requires_grad)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_grad else None
        for chunk in torch.arange(len(hidden)).split(max(1, _CHUNK_ELEMENTS[hidden.device.type] // len(weight))):
            part = slice(int(chunk[0]), int(chunk[-1]) + 1)
            kept = labels[part] != IGNORED_LABEL
            label = labels[part].masked_fill(~kept, 0)[:, None]
            logits = (hidden[part] @ weight.T).to(wide)
            log_normalizer = logits.logsumexp(-1)
            total += ((log_normalizer - logits.gather(1, label)[:, 0]) * kept).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = logits.sub_(log_normalizer[:, None]).exp_()  # softmax, in place
            grad.scatter_add_(1, label, grad.new_full(label.shape, -1.0))
            grad = grad.mul_(kept[:, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad.is_cuda and grad.dtype != wide:
                torch.addmm(grad_weight, grad.T, hidden[part], out_dtype=wide, out=grad_weight)
            else:
                grad_weight.addmm_(grad.T.to(wide), hidden[part].to(wide))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None
