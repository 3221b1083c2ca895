"""Triton kernels of the router.

logits: a program owns TOKENS tokens and walks over D; its products are of 16-bit operands, which fp32 holds exactly.
Backward, the fp32 gradient of the logits enters as the sum of two 16-bit numbers.
choice: a program owns TOKENS tokens of one row and holds all their logits; sums over a row's tokens are written per
program and added in order by one reduction, so that they have the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, NUM_WARPS, NUM_STAGES = 64, 128, 4, 5
GRAD_TOKENS, GRAD_COLUMNS = 32, 128
SPLITS = 16
"""Most shares of the tokens, whose weight gradients are added at the end."""
CHOICE_LOGITS = 4096
"""Tokens of a program of the choice times experts."""


@triton.jit
def _logits_kernel(
    x, weight, logits, n,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in range(0, D, COLUMNS):
        at = start + column
        a = tl.load(x + token * D + at[None, :], (token < n) & (at < D)[None, :], other=0)
        b = tl.load(weight + expert[None, :] * D + at[:, None], (expert < E)[None, :] & (at < D)[:, None], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(logits + token * E + expert[None, :], total, (token < n) & (expert < E)[None, :])


@triton.jit
def _two_parts(grad, dtype: tl.constexpr):
    high = grad.to(dtype)
    return high, (grad - high.to(tl.float32)).to(dtype)


@triton.jit
def _grad_x_kernel(
    grad, weight, grad_passed, grad_x, n, HAS_PASSED: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // num_column_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = ((tl.program_id(0) % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    expert = tl.arange(0, WIDTH)
    g = tl.load(grad + token * E + expert[None, :], (token < n) & (expert < E)[None, :], other=0)
    w = tl.load(weight + expert[:, None] * D + column, (expert < E)[:, None] & (column < D), other=0)
    high, low = _two_parts(g, w.dtype)
    total = tl.dot(low, w, input_precision="ieee")
    total = tl.dot(high, w, total, input_precision="ieee")
    exists = (token < n) & (column < D)
    if HAS_PASSED:
        total += tl.load(grad_passed + token * D + column, exists, other=0).to(tl.float32)
    tl.store(grad_x + token * D + column, total, exists)


@triton.jit
def _grad_weight_kernel(
    grad, x, shares, n, tokens_of_a_share,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    share = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    column = ((tl.program_id(0) % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    expert = tl.arange(0, WIDTH)[:, None]
    end = tl.minimum((share + 1) * tokens_of_a_share, n)
    total = tl.zeros([WIDTH, COLUMNS], tl.float32)
    for start in range(share * tokens_of_a_share, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        g = tl.load(grad + token[None, :] * E + expert, (token < end)[None, :] & (expert < E), other=0)
        a = tl.load(x + token[:, None] * D + column, (token < end)[:, None] & (column < D), other=0)
        high, low = _two_parts(g, a.dtype)
        total = tl.dot(low, a, total, input_precision="ieee")
        total = tl.dot(high, a, total, input_precision="ieee")
    tl.store(shares + (share * E + expert) * D + column, total, (expert < E) & (column < D))


@triton.jit
def _probabilities(logits, token, expert, T, E: tl.constexpr):
    """Logits, probabilities, logarithms of their normalizers; a logit that is not there has probability 0."""
    x = tl.load(logits + token * E + expert, (token < T) & (expert < E), other=-float("inf")).to(tl.float32)
    x = tl.where(token < T, x, 0.0)
    top = tl.max(x, 1)
    e = tl.exp(x - top[:, None])
    total = tl.sum(e, 1)
    return x, e / total[:, None], top + tl.log(total)


@triton.jit
def _choose_fwd_kernel(
    logits, bias, experts, weights, sums, T, num_blocks, HAS_BIAS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    b, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
    token = (block * TOKENS + tl.arange(0, TOKENS))[:, None]
    expert = tl.arange(0, WIDTH)[None, :]
    here = token < T
    x, p, log_normalizer = _probabilities(logits + b * T * E, token, expert, T, E)
    score = x
    if HAS_BIAS:
        score = x + tl.load(bias + expert, expert < E, other=0).to(tl.float32)
    # A NaN compares with nothing: lanes would disagree on the winner.
    score = tl.where(score == score, score, float("inf"))
    left = expert < E
    chosen = tl.zeros([TOKENS, WIDTH], tl.float32)
    total = tl.zeros([TOKENS, 1], tl.float32)
    row = (b * T + token) * K  # [TOKENS, 1]
    for i in tl.static_range(K):
        largest = tl.max(tl.where(left, score, -float("inf")), 1)[:, None]
        index = tl.min(tl.where(left & (score == largest), expert, WIDTH), 1)[:, None]
        this = expert == index
        total += tl.sum(tl.where(this, p, 0.0), 1)[:, None]
        tl.store(experts + row + i, index.to(tl.int64), here)
        left = left & (expert != index)
        chosen += tl.where(this, 1.0, 0.0)
    part = p
    if HAS_BIAS:
        # What a bias lets in may be so improbable that all its probabilities round to 0.
        of_chosen = tl.where(chosen > 0, x, -float("inf"))
        part = tl.exp(of_chosen - tl.max(of_chosen, 1)[:, None])
        total = tl.sum(part, 1)[:, None]
    for i in tl.static_range(K):
        index = tl.load(experts + row + i, here, other=0)
        share = tl.div_rn(tl.sum(tl.where(expert == index, part, 0.0), 1)[:, None], total)  # of one expert exactly 1
        tl.store(weights + row + i, share, here)
    at = sums + (b * num_blocks + block) * (3 * E + 2)
    exists = tl.arange(0, WIDTH) < E
    tl.store(at + tl.arange(0, WIDTH), tl.sum(tl.where(here, p, 0.0), 0) / T, exists)
    tl.store(at + E + tl.arange(0, WIDTH), tl.sum(tl.where(here, x, 0.0), 0) / T, exists)
    z = tl.where(here, (log_normalizer * log_normalizer)[:, None], 0.0)
    tl.store(at + 2 * E, tl.sum(tl.sum(z, 1), 0) / T)
    # What is impossible has a logit of -inf, and no part.
    entropy = tl.where(here, p * (log_normalizer[:, None] - tl.where(p > 0, x, 0.0)), 0.0)
    tl.store(at + 2 * E + 1, tl.sum(tl.sum(entropy, 1), 0) / T)
    tl.store(at + 2 * E + 2 + tl.arange(0, WIDTH), tl.sum(tl.where(here, chosen, 0.0), 0), exists)


@triton.jit
def _choose_bwd_kernel(
    grad_weights, grad_means, logits, experts, weights, grad_logits, T, num_blocks,
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    b, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
    token = (block * TOKENS + tl.arange(0, TOKENS))[:, None]
    expert = tl.arange(0, WIDTH)[None, :]
    here = token < T
    _, p, log_normalizer = _probabilities(logits + b * T * E, token, expert, T, E)
    # dL/dlogit of the weights first: w is a softmax over the chosen, whose logits are those of all.
    row = (b * T + token) * K
    mean = tl.zeros([TOKENS, 1], tl.float32)
    for i in tl.static_range(K):
        g = tl.load(grad_weights + row + i, here, other=0).to(tl.float32)
        mean += g * tl.load(weights + row + i, here, other=0).to(tl.float32)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i in tl.static_range(K):
        g = tl.load(grad_weights + row + i, here, other=0).to(tl.float32)
        w = tl.load(weights + row + i, here, other=0).to(tl.float32)
        total += tl.where(expert == tl.load(experts + row + i, here, other=0), w * (g - mean), 0.0)
    grad_means += b * (2 * E + 2)
    g = tl.load(grad_means + expert, expert < E, other=0).to(tl.float32) / T
    total += p * (g - tl.sum(p * g, 1)[:, None])
    total += p * (2.0 * log_normalizer[:, None] * (tl.load(grad_means + 2 * E).to(tl.float32) / T))
    tl.store(grad_logits + (b * T + token) * E + expert, total, here & (expert < E))


def logits_forward(x: Tensor, weight: Tensor) -> Tensor:
    """As `op.router_logits`, of contiguous tensors."""
    E, D = weight.shape
    n = x.shape[:-1].numel()
    logits = x.new_empty(*x.shape[:-1], E, dtype=torch.float32)
    if n:
        sizes = (n, D, E, _width(E), TOKENS, min(COLUMNS, _width(D)))
        _logits_kernel[(triton.cdiv(n, TOKENS),)](x, weight, logits, *sizes, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return logits


def logits_backward(grad: Tensor, grad_passed: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x, with that of its other uses if given, and fp32 `[shares, E, D]` that sum to the weight's; all
    contiguous, the logits' is fp32."""
    E, D = weight.shape
    n = x.shape[:-1].numel()
    tokens_of_a_share = max(1, triton.cdiv(n, SPLITS * GRAD_TOKENS)) * GRAD_TOKENS
    num_shares = triton.cdiv(n, tokens_of_a_share)
    grad_x, shares = torch.empty_like(x), weight.new_empty(num_shares, E, D, dtype=torch.float32)
    if n:
        columns = min(GRAD_COLUMNS, _width(D))
        num_blocks = triton.cdiv(D, columns)
        sizes = (D, E, _width(E), GRAD_TOKENS, columns)
        grid = (triton.cdiv(n, GRAD_TOKENS) * num_blocks,)
        passed = grad_x if grad_passed is None else grad_passed
        _grad_x_kernel[grid](grad, weight, passed, grad_x, n, grad_passed is not None, *sizes, num_warps=NUM_WARPS)
        grid = (num_shares * num_blocks,)
        _grad_weight_kernel[grid](grad, x, shares, n, tokens_of_a_share, *sizes, num_warps=NUM_WARPS)
    return grad_x, shares


def choose_forward(logits: Tensor, top_k: int, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `op.Choice`, of contiguous logits with at least one token a row, and a contiguous bias if there is one."""
    B, T, E = logits.shape
    experts = torch.empty(B, T, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(B, T, top_k)
    width, tokens, num_blocks = _choice_blocks(T, E)
    sums = torch.empty(B, num_blocks, 3 * E + 2, dtype=torch.float32, device=logits.device)
    if B:
        arguments = (logits, logits if bias is None else bias, experts, weights, sums)
        sizes = (T, num_blocks, bias is not None, E, top_k, width, tokens)
        _choose_fwd_kernel[(B * num_blocks,)](*arguments, *sizes, num_warps=NUM_WARPS)
    means, load = sums.sum(1).split((2 * E + 2, E), dim=-1)
    return experts, weights, load.long(), means


def choose_backward(
    grad_weights: Tensor, grad_means: Tensor, logits: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Gradient of the logits, from contiguous tensors."""
    B, T, E = logits.shape
    grad_logits = torch.empty_like(logits)
    width, tokens, num_blocks = _choice_blocks(T, E)
    if B:
        arguments = (grad_weights, grad_means, logits, experts, weights, grad_logits)
        sizes = (T, num_blocks, E, experts.shape[-1], width, tokens)
        _choose_bwd_kernel[(B * num_blocks,)](*arguments, *sizes, num_warps=NUM_WARPS)
    return grad_logits


def _width(size: int) -> int:
    """The power of two that holds `size`, and that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def _choice_blocks(T: int, E: int) -> tuple[int, int, int]:
    """Lanes for the experts, tokens of a program, programs of a row."""
    width = triton.next_power_of_2(E)
    tokens = min(CHOICE_LOGITS // width, max(16, triton.next_power_of_2(T)))
    return width, tokens, triton.cdiv(T, tokens)
