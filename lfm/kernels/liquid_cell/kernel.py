"""Triton kernels of a liquid cell over a window: a program takes one sequence through all of its tokens, by itself.

A token is a chain of evaluations of the field, each two products of the cell's matrices with one vector, and no
sequence waits for another.  So a program streams the matrices from the L2 cache at every evaluation and multiplies with
FMAs in fp32: 3 D^2 weights, 0.4 MB of bf16 at D = 256, are 4 us of what one multiprocessor can fetch and 1 us of its
FMAs.  A vector that a product reads is first stored, where backward finds it too, and loaded again in pieces.

With traces a program first forms `A = W + alpha * M` for its sequence, token by token, and then multiplies with A.  M
is not stored by token: of a window it is `c M_0 + sum_k w_k post_k pre_k^T`, tiles of which tensor cores form when
needed.  Backward holds the gradient of M, a matrix, in memory, and adds a token's evaluations to it at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfm.kernels.liquid_cell.limits import EVALUATIONS, TOKENS
from lfm.kernels.liquid_cell.reference import Integration

COUNTS = ("T", "B", "steps", "evaluations", "rows_of_a_share")
"""Arguments whose values make no difference to the code."""
EULER, MIDPOINT, EXPONENTIAL = 0, 1, 2
RECORD = 8
"""Numbers kept of a trace at a token: see `_record`."""


class Tiling(NamedTuple):
    """How a program cuts its matrices."""

    block: int
    """Columns (backward: rows) of a matrix multiplied at a time."""
    rows: int
    """Of a trace formed at a time."""
    num_warps: int
    stages: int
    """Of the loop over a matrix: one block is multiplied, the next ones are on their way."""
    trace_stages: int
    """Of the loop over a trace."""


@triton.jit
def _tanh(z):
    """To fp32's precision near zero as well, where the quotient has lost its digits."""
    falling = tl.exp(-2.0 * tl.abs(z))
    quotient = (1.0 - falling) / (1.0 + falling)
    square = z * z
    series = z * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.2, series, tl.where(z < 0, -quotient, quotient))


@triton.jit
def _softplus(q):
    return tl.maximum(q, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(q)))


@triton.jit
def _decayed(x):
    """`1 - exp(-x)` for x >= 0, to fp32's precision near zero as well."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x * (1.0 / 120.0)))))
    return tl.where(x < 0.1, series, 1.0 - tl.exp(-x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _product(matrix, vector, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """fp32 `[D]`: `matrix [D, D]` times `vector [D]`, both in memory."""
    row, column = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([D, BLOCK], tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=STAGES):
        m = tl.load(matrix + row * D + first + column)
        v = tl.load(vector + first + column)
        total += m.to(tl.float32) * v
    return tl.sum(total, 1)


@triton.jit
def _two_products(one, other, vector, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """fp32 `[D]` each: both matrices `[D, D]` times the same vector."""
    row, column = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    total, total_other = tl.zeros([D, BLOCK], tl.float32), tl.zeros([D, BLOCK], tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=STAGES):
        m, n = tl.load(one + row * D + first + column), tl.load(other + row * D + first + column)
        v = tl.load(vector + first + column)
        total += m.to(tl.float32) * v
        total_other += n.to(tl.float32) * v
    return tl.sum(total, 1), tl.sum(total_other, 1)


@triton.jit
def _transposed_product(matrix, vector, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """fp32 `[D]`: the transpose of `matrix [D, D]` times `vector [D]`, both in memory."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    total = tl.zeros([BLOCK, D], tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=STAGES):
        m = tl.load(matrix + (first + row) * D + column)
        v = tl.load(vector + first + row)
        total += m.to(tl.float32) * v
    return tl.sum(total, 0)


@triton.jit
def _transposed_sum(one, other, vectors, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """fp32 `[D]`: the transposes of two matrices `[D, D]` times the halves of `vectors [2 D]`, added up."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    total = tl.zeros([BLOCK, D], tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=STAGES):
        m, n = tl.load(one + (first + row) * D + column), tl.load(other + (first + row) * D + column)
        v, w = tl.load(vectors + first + row), tl.load(vectors + D + first + row)
        total += m.to(tl.float32) * v + n.to(tl.float32) * w
    return tl.sum(total, 0)


@triton.jit
def _field(
    h, drive_z, drive_s, z_matrix, s_matrix, tau, tau_bias, u, s, r, q, z, at,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """z and tau at h.  Stored at `at`: h in u, what silu takes and gives in s and r, what softplus takes in q, z."""
    d = tl.arange(0, D)
    tl.store(u + at + d, h)
    tl.debug_barrier()
    recurrent, inner = _two_products(z_matrix, s_matrix, u + at, D, BLOCK, STAGES)
    inner += drive_s
    tl.store(s + at + d, inner)
    tl.store(r + at + d, inner * _sigmoid(inner))
    tl.debug_barrier()
    drawn = _tanh(drive_z + recurrent)
    rate = tau_bias + _product(tau, r + at, D, BLOCK, STAGES)
    tl.store(q + at + d, rate)
    tl.store(z + at + d, drawn)
    return drawn, _softplus(rate) + 0.2


@triton.jit
def _normed(y, epsilon, D: tl.constexpr):
    """The normalized y and the factor in it."""
    centered = y - tl.sum(y, 0) / D
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / D + epsilon)
    return centered * scale, scale


@triton.jit
def _vectors(at, tokens, D: tl.constexpr, K: tl.constexpr):
    """`[K, D]`: the vectors `[T, D]` of the first `tokens` tokens, and zeros."""
    k, d = tl.arange(0, K)[:, None], tl.arange(0, D)[None, :]
    return tl.load(at + k * D + d, k < tokens, other=0)


@triton.jit
def _trace_rows(start, post, pre, scale, weights, tokens, first, D: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    """fp32 `[ROWS, D]` of the trace after `tokens` tokens of the window: `scale M_0 + sum_k weights_k post_k pre_k^T`.

    start `[D, D]` and post `[T, D]` in memory; pre `[K, D]`, weights `[K]`.
    """
    row, column, k = first + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, K)
    trace = scale * tl.load(start + row[:, None] * D + column[None, :])
    left = tl.load(post + k[None, :] * D + row[:, None], k[None, :] < tokens, other=0) * weights[None, :]
    return trace + tl.dot(left, pre, input_precision="tf32x3")


@triton.jit
def _overlap(vector, other, post, pre, weights, tokens, D: tl.constexpr, K: tl.constexpr):
    """`sum_k weights_k (vector . post_k) (other . pre_k)`."""
    left = tl.sum(_vectors(post, tokens, D, K) * vector[None, :], 1)
    right = tl.sum(_vectors(pre, tokens, D, K) * other[None, :], 1)
    return tl.sum(weights * left * right, 0)


@triton.jit
def _grown(squared_norm, overlap, post_square, pre_square, eta, decay, largest):
    """Squared norm of `decay M + eta post pre^T`, and the factor that brings the norm back to the largest."""
    grown = decay * decay * squared_norm + 2 * decay * eta * overlap + eta * eta * post_square * pre_square
    exceeds = grown > largest * largest
    factor = tl.where(exceeds, largest / (tl.sqrt(tl.where(exceeds, grown, 1.0)) + 1e-8), 1.0)
    return grown, factor


@triton.jit
def _record(records, weights, scale, squared_norm, grown, factor, K: tl.constexpr):
    """Keep what a token found of a trace and did to it: weights by token `[K]`, then four numbers."""
    tl.store(records + tl.arange(0, K), weights)
    tl.store(records + K, scale)
    tl.store(records + K + 1, squared_norm)
    tl.store(records + K + 2, grown)
    tl.store(records + K + 3, factor)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x, drive, state, hidden, tau, tau_bias, gain, bias, keep, fresh,
    start_ih, start_hh, alpha_ih, alpha_hh, rules,
    u, s, r, q, z, end, states, effective, scratch, records,
    T, epsilon, steps, evaluations, D: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    FRESH: tl.constexpr, PLASTIC: tl.constexpr, K: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    TRACE_STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d, k = tl.arange(0, D), tl.arange(0, K)
    h = tl.load(state + b * D + d)
    dt = 1.0 / steps
    s_matrix = hidden + D * D
    t2, g, o = tl.load(tau_bias + d), tl.load(gain + d), tl.load(bias + d)
    x += b * T * D
    end += b * T * D
    if PLASTIC:
        start_ih += b * D * D
        start_hh += b * D * D
        effective += b * D * D
        scratch += b * 2 * D
        records += b * 2 * (T + 1) * (K + RECORD)
        z_matrix = effective
        eta_ih, decay_ih, largest_ih = tl.load(rules), tl.load(rules + 1), tl.load(rules + 2)
        eta_hh, decay_hh, largest_hh = tl.load(rules + 3), tl.load(rules + 4), tl.load(rules + 5)
        scale_ih, scale_hh = 1.0, 1.0
        squares_ih, squares_hh = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
        for first in tl.range(0, D, ROWS, num_stages=TRACE_STAGES):
            tile = (first + tl.arange(0, ROWS))[:, None] * D + d[None, :]
            m_ih, m_hh = tl.load(start_ih + tile), tl.load(start_hh + tile)
            squares_ih += m_ih * m_ih
            squares_hh += m_hh * m_hh
        norm_ih, norm_hh = tl.sum(tl.sum(squares_ih, 1), 0), tl.sum(tl.sum(squares_hh, 1), 0)
        weights_ih, weights_hh = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    else:
        z_matrix = hidden
    for t in range(T):
        if FRESH:
            continues = tl.load(fresh + b * T + t) == 0
            h = tl.where(continues, h, 0.0)
            if PLASTIC:
                scale_ih, scale_hh = tl.where(continues, scale_ih, 0.0), tl.where(continues, scale_hh, 0.0)
                norm_ih, norm_hh = tl.where(continues, norm_ih, 0.0), tl.where(continues, norm_hh, 0.0)
                weights_ih = tl.where(continues, weights_ih, 0.0)
                weights_hh = tl.where(continues, weights_hh, 0.0)
        token = b * T + t
        x_t = tl.load(x + t * D + d)
        drive_z, drive_s = tl.load(drive + token * 2 * D + d), tl.load(drive + token * 2 * D + D + d)
        if PLASTIC:
            pre_ih, pre_hh = _vectors(x, t, D, K), _vectors(end, t, D, K)
            for first in tl.range(0, D, ROWS, num_stages=TRACE_STAGES):
                row = first + tl.arange(0, ROWS)
                tile = row[:, None] * D + d[None, :]
                m = _trace_rows(start_ih, end, pre_ih, scale_ih, weights_ih, t, first, D, ROWS, K)
                tl.store(scratch + row, tl.sum(m * x_t[None, :], 1))
                a = tl.load(alpha_ih + tile).to(tl.float32)
                tl.store(scratch + D + row, tl.sum(a * m * x_t[None, :], 1))
                m = _trace_rows(start_hh, end, pre_hh, scale_hh, weights_hh, t, first, D, ROWS, K)
                a = tl.load(alpha_hh + tile).to(tl.float32)
                tl.store(effective + tile, tl.load(hidden + tile).to(tl.float32) + a * m)
            tl.debug_barrier()
            traced = tl.load(scratch + d)  # M_ih x
            drive_z += tl.load(scratch + D + d)
        at = token * evaluations * D
        for _ in range(steps):
            value, time = _field(
                h, drive_z, drive_s, z_matrix, s_matrix, tau, t2, u, s, r, q, z, at, D, BLOCK, STAGES
            )  # fmt: skip
            at += D
            if KIND == 2:
                h += _decayed(dt / time) * (value - h)
            else:
                slope = (value - h) / time
                if KIND == 1:
                    middle = h + 0.5 * dt * slope
                    value, time = _field(
                        middle, drive_z, drive_s, z_matrix, s_matrix, tau, t2, u, s, r, q, z, at, D, BLOCK, STAGES
                    )  # fmt: skip
                    at += D
                    slope = (value - middle) / time
                h += dt * slope
        tl.store(end + t * D + d, h)
        if PLASTIC:
            tl.debug_barrier()
            square = tl.sum(h * h, 0)
            overlap = tl.sum(h * traced, 0)
            grown, factor = _grown(norm_ih, overlap, square, tl.sum(x_t * x_t, 0), eta_ih, decay_ih, largest_ih)
            _record(records + 2 * t * (K + RECORD), weights_ih, scale_ih, norm_ih, grown, factor, K)
            norm_ih = factor * factor * grown
            scale_ih *= factor * decay_ih
            weights_ih = tl.where(k == t, factor * eta_ih, factor * decay_ih * weights_ih)
            overlap = scale_hh * tl.sum(h * _product(start_hh, end + t * D, D, BLOCK, STAGES), 0)
            overlap += _overlap(h, h, end, end, weights_hh, t, D, K)
            grown, factor = _grown(norm_hh, overlap, square, square, eta_hh, decay_hh, largest_hh)
            _record(records + (2 * t + 1) * (K + RECORD), weights_hh, scale_hh, norm_hh, grown, factor, K)
            norm_hh = factor * factor * grown
            scale_hh *= factor * decay_hh
            weights_hh = tl.where(k == t, factor * eta_hh, factor * decay_hh * weights_hh)
        normed, _ = _normed(h + x_t, epsilon, D)
        h = normed * g + o
        if KEEP:
            h *= tl.load(keep + token * D + d)
        tl.store(states + token * D + d, h)
    if PLASTIC:
        _record(records + 2 * T * (K + RECORD), weights_ih, scale_ih, norm_ih, norm_ih, 1.0, K)
        _record(records + (2 * T + 1) * (K + RECORD), weights_hh, scale_hh, norm_hh, norm_hh, 1.0, K)


@triton.jit
def _field_backward(
    grad_z, grad_tau, z_matrix, s_matrix, tau, s, q, z, grad_fields, grad_rates, at,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From gradients of z and tau: those of h, of what tanh took and of what silu took.

    The last two are also stored, side by side, in grad_fields, and that of what softplus took in grad_rates.
    """
    d = tl.arange(0, D)
    value = tl.load(z + at + d)
    into_tanh = grad_z * (1.0 - value * value)
    tl.store(grad_rates + at + d, grad_tau * _sigmoid(tl.load(q + at + d)))
    tl.store(grad_fields + 2 * at + d, into_tanh)
    tl.debug_barrier()
    inner = tl.load(s + at + d)
    gate = _sigmoid(inner)
    into_silu = _transposed_product(tau, grad_rates + at, D, BLOCK, STAGES) * gate * (1.0 + inner * (1.0 - gate))
    tl.store(grad_fields + 2 * at + D + d, into_silu)
    tl.debug_barrier()
    grad_h = _transposed_sum(z_matrix, s_matrix, grad_fields + 2 * at, D, BLOCK, STAGES)
    return grad_h, into_tanh, into_silu


@triton.jit
def _rule_backward(
    post, pre, v_pre, v_post, r_pre, r_post, inner, norm, grown, factor, eta, decay, largest
):  # fmt: skip
    """One token's step of a trace backward, from G, the gradient of the trace M' after it.

        N = decay M + eta post pre^T,  M' = factor N          gradient of N: factor G + bend N

    v_pre = G pre, v_post = G^T post, r_pre = M pre, r_post = M^T post, inner = <G, M>, norm = |M|^2, grown = |N|^2.
    Returns bend, and the gradients of post, pre, eta, decay and largest.
    """
    exceeds = grown > largest * largest
    length = tl.sqrt(tl.where(exceeds, grown, 1.0))
    both = tl.sum(post * v_pre, 0)
    of_factor = tl.where(exceeds, decay * inner + eta * both, 0.0)  # <G, N>
    bend = -of_factor * factor / ((length + 1e-8) * length)
    post_square, pre_square = tl.sum(post * post, 0), tl.sum(pre * pre, 0)
    n_pre = factor * v_pre + bend * (decay * r_pre + eta * pre_square * post)
    n_post = factor * v_post + bend * (decay * r_post + eta * post_square * pre)
    grad_eta = tl.sum(post * n_pre, 0)
    grad_decay = factor * inner + bend * (decay * norm + eta * tl.sum(post * r_pre, 0))
    return bend, eta * n_pre, eta * n_post, grad_eta, grad_decay, of_factor / (length + 1e-8)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    grad_states, grad_end, x, keep, fresh, hidden, tau, gain,
    start_ih, start_hh, alpha_ih, alpha_hh, rules,
    u, s, q, z, end, records,
    grad_x, grad_drive, grad_state, grad_fields, grad_rates, grad_norm, grad_rules,
    grad_ih, grad_hh, effective, scratch,
    T, epsilon, steps, evaluations, D: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    FRESH: tl.constexpr, ENDS: tl.constexpr, PLASTIC: tl.constexpr, THROUGH: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    TRACE_STAGES: tl.constexpr,
):  # fmt: skip
    """grad_ih and grad_hh hold the gradients of the traces after the window, and at the end those before it.

    THROUGH: through the changes of the traces as well.
    """
    b = tl.program_id(0).to(tl.int64)
    d, k = tl.arange(0, D), tl.arange(0, K)
    dt = 1.0 / steps
    s_matrix = hidden + D * D
    g = tl.load(gain + d)
    grad_gain, grad_bias, carry = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    x += b * T * D
    end += b * T * D
    if PLASTIC:
        start_ih += b * D * D
        start_hh += b * D * D
        grad_ih += b * D * D
        grad_hh += b * D * D
        effective += b * D * D
        scratch += b * 4 * D
        records += b * 2 * (T + 1) * (K + RECORD)
        z_matrix = effective
        eta_ih, decay_ih, largest_ih = tl.load(rules), tl.load(rules + 1), tl.load(rules + 2)
        eta_hh, decay_hh, largest_hh = tl.load(rules + 3), tl.load(rules + 4), tl.load(rules + 5)
        sum_eta_ih, sum_decay_ih, sum_largest_ih = 0.0, 0.0, 0.0
        sum_eta_hh, sum_decay_hh, sum_largest_hh = 0.0, 0.0, 0.0
    else:
        z_matrix = hidden
    for back in range(T):
        t = T - 1 - back
        token = b * T + t
        x_t, end_t = tl.load(x + t * D + d), tl.load(end + t * D + d)
        grad = tl.load(grad_states + token * D + d) + carry
        if KEEP:
            grad *= tl.load(keep + token * D + d)
        normed, scale = _normed(end_t + x_t, epsilon, D)
        grad_gain += grad * normed
        grad_bias += grad
        grad *= g
        grad = scale * (grad - tl.sum(grad, 0) / D - normed * (tl.sum(grad * normed, 0) / D))
        grad_x_t = grad
        if ENDS:
            grad += tl.load(grad_end + token * D + d)
        if PLASTIC:
            kept_ih, kept_hh = records + 2 * t * (K + RECORD), records + (2 * t + 1) * (K + RECORD)
            weights_ih, weights_hh = tl.load(kept_ih + k), tl.load(kept_hh + k)
            scale_ih, scale_hh = tl.load(kept_ih + K), tl.load(kept_hh + K)
            pre_ih, pre_hh = _vectors(x, t, D, K), _vectors(end, t, D, K)
            # Sums over rows wait until all tiles are through.
            inner_ih, inner_hh = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
            v_post_ih, r_post_ih = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
            v_post_hh, r_post_hh = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
            for first in tl.range(0, D, ROWS, num_stages=TRACE_STAGES):
                row = first + tl.arange(0, ROWS)
                tile = row[:, None] * D + d[None, :]
                m = _trace_rows(start_hh, end, pre_hh, scale_hh, weights_hh, t, first, D, ROWS, K)
                a = tl.load(alpha_hh + tile).to(tl.float32)
                tl.store(effective + tile, tl.load(hidden + tile).to(tl.float32) + a * m)
                if THROUGH:
                    post = tl.load(end + t * D + row)[:, None]
                    grad_m = tl.load(grad_hh + tile)
                    inner_hh += grad_m * m
                    v_post_hh += grad_m * post
                    r_post_hh += m * post
                    tl.store(scratch + row, tl.sum(grad_m * end_t[None, :], 1))
                    tl.store(scratch + D + row, tl.sum(m * end_t[None, :], 1))
                    m = _trace_rows(start_ih, end, pre_ih, scale_ih, weights_ih, t, first, D, ROWS, K)
                    grad_m = tl.load(grad_ih + tile)
                    inner_ih += grad_m * m
                    v_post_ih += grad_m * post
                    r_post_ih += m * post
                    tl.store(scratch + 2 * D + row, tl.sum(grad_m * x_t[None, :], 1))
                    tl.store(scratch + 3 * D + row, tl.sum(m * x_t[None, :], 1))
            tl.debug_barrier()
            if THROUGH:
                norm, grown, factor_hh = tl.load(kept_hh + K + 1), tl.load(kept_hh + K + 2), tl.load(kept_hh + K + 3)
                bend_hh, of_post, of_pre, of_eta, of_decay, of_largest = _rule_backward(
                    end_t, end_t, tl.load(scratch + d), tl.sum(v_post_hh, 0), tl.load(scratch + D + d),
                    tl.sum(r_post_hh, 0), tl.sum(tl.sum(inner_hh, 1), 0), norm, grown, factor_hh,
                    eta_hh, decay_hh, largest_hh,
                )  # fmt: skip
                grad += of_post + of_pre
                sum_eta_hh += of_eta
                sum_decay_hh += of_decay
                sum_largest_hh += of_largest
                norm, grown, factor_ih = tl.load(kept_ih + K + 1), tl.load(kept_ih + K + 2), tl.load(kept_ih + K + 3)
                bend_ih, of_post, of_pre, of_eta, of_decay, of_largest = _rule_backward(
                    end_t, x_t, tl.load(scratch + 2 * D + d), tl.sum(v_post_ih, 0), tl.load(scratch + 3 * D + d),
                    tl.sum(r_post_ih, 0), tl.sum(tl.sum(inner_ih, 1), 0), norm, grown, factor_ih,
                    eta_ih, decay_ih, largest_ih,
                )  # fmt: skip
                grad += of_post
                grad_x_t += of_pre
                sum_eta_ih += of_eta
                sum_decay_ih += of_decay
                sum_largest_ih += of_largest

        drive_z, drive_s = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
        at = (token + 1) * evaluations * D
        for _ in range(steps):
            at -= D
            value, time = tl.load(z + at + d), _softplus(tl.load(q + at + d)) + 0.2
            if KIND == 1:
                middle = tl.load(u + at + d)
                of_z = dt * grad / time
                of_middle, into_tanh, into_silu = _field_backward(
                    of_z, -of_z * (value - middle) / time, z_matrix, s_matrix, tau, s, q, z, grad_fields, grad_rates,
                    at, D, BLOCK, STAGES,
                )  # fmt: skip
                drive_z += into_tanh
                drive_s += into_silu
                of_middle -= of_z
                grad += of_middle
                of_slope = 0.5 * dt * of_middle
                at -= D
                value, time = tl.load(z + at + d), _softplus(tl.load(q + at + d)) + 0.2
            else:
                of_slope = dt * grad
            before = tl.load(u + at + d)
            if KIND == 2:
                moved = _decayed(dt / time)
                of_z = grad * moved
                of_time = -grad * (value - before) * (1.0 - moved) * dt / (time * time)
            else:
                of_z = of_slope / time
                of_time = -of_z * (value - before) / time
            of_h, into_tanh, into_silu = _field_backward(
                of_z, of_time, z_matrix, s_matrix, tau, s, q, z, grad_fields, grad_rates, at, D, BLOCK, STAGES
            )  # fmt: skip
            drive_z += into_tanh
            drive_s += into_silu
            grad += of_h - of_z
        tl.store(grad_drive + token * 2 * D + d, drive_z)
        tl.store(grad_drive + token * 2 * D + D + d, drive_s)

        carry = grad
        if FRESH:
            continues = tl.load(fresh + b * T + t) == 0
            carry = tl.where(continues, carry, 0.0)
        if PLASTIC:
            tl.debug_barrier()
            e = tl.arange(0, E)
            evaluation = (token * evaluations + e) * D
            taken = e < evaluations
            right = tl.load(u + evaluation[:, None] + d[None, :], taken[:, None], other=0)
            through_ih = tl.zeros([ROWS, D], tl.float32)
            for first in tl.range(0, D, ROWS, num_stages=TRACE_STAGES):
                row = first + tl.arange(0, ROWS)
                tile = row[:, None] * D + d[None, :]
                of_row = tl.load(grad_drive + token * 2 * D + row)[:, None]
                m = _trace_rows(start_ih, end, pre_ih, scale_ih, weights_ih, t, first, D, ROWS, K)
                a = tl.load(alpha_ih + tile).to(tl.float32)
                through_ih += a * m * of_row
                if THROUGH:
                    post = tl.load(end + t * D + row)[:, None]
                    summed = decay_ih * m + eta_ih * post * x_t[None, :]
                    grad_m = (
                        decay_ih * (factor_ih * tl.load(grad_ih + tile) + bend_ih * summed) + a * of_row * x_t[None, :]
                    )
                    if FRESH:
                        grad_m = tl.where(continues, grad_m, 0.0)
                    tl.store(grad_ih + tile, grad_m)
                    m = _trace_rows(start_hh, end, pre_hh, scale_hh, weights_hh, t, first, D, ROWS, K)
                    a = tl.load(alpha_hh + tile).to(tl.float32)
                    left = tl.load(grad_fields + 2 * evaluation[None, :] + row[:, None], taken[None, :], other=0)
                    outer = tl.dot(left, right, input_precision="tf32x3")
                    summed = decay_hh * m + eta_hh * post * end_t[None, :]
                    grad_m = decay_hh * (factor_hh * tl.load(grad_hh + tile) + bend_hh * summed)
                    grad_m += a * outer
                    if FRESH:
                        grad_m = tl.where(continues, grad_m, 0.0)
                    tl.store(grad_hh + tile, grad_m)
            grad_x_t += tl.sum(through_ih, 0)
            tl.debug_barrier()
        tl.store(grad_x + token * D + d, grad_x_t)
    tl.store(grad_state + b * D + d, carry)
    tl.store(grad_norm + b * 2 * D + d, grad_gain)
    tl.store(grad_norm + b * 2 * D + D + d, grad_bias)
    if PLASTIC:
        tl.store(grad_rules + b * 6, sum_eta_ih)
        tl.store(grad_rules + b * 6 + 1, sum_decay_ih)
        tl.store(grad_rules + b * 6 + 2, sum_largest_ih)
        tl.store(grad_rules + b * 6 + 3, sum_eta_hh)
        tl.store(grad_rules + b * 6 + 4, sum_decay_hh)
        tl.store(grad_rules + b * 6 + 5, sum_largest_hh)


@triton.jit(do_not_specialize=COUNTS)
def _alpha_kernel(
    start, post, pre, left, right, fresh, records, rules, shares, B, T, rows_of_a_share, evaluations,
    D: tl.constexpr, FRESH: tl.constexpr, WHICH: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    RECORD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of alpha's gradient, of a share of the sequences: the sum over tokens of `M * sum_e left_e right_e^T`.

    left `[B, T, evaluations, 2 D]`, of which the first half counts, right `[B, T, evaluations, D]`.
    """
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    share, e = tl.program_id(2), tl.arange(0, E)
    tile = row[:, None] * D + column[None, :]
    taken = e < evaluations
    grow, fade = tl.load(rules + 3 * WHICH), tl.load(rules + 3 * WHICH + 1)
    total = tl.zeros([TILE, TILE], tl.float32)
    for b in range(share * rows_of_a_share, tl.minimum((share + 1) * rows_of_a_share, B)):
        sequence = tl.cast(b, tl.int64)
        trace = tl.load(start + sequence * D * D + tile)
        for t in range(T):
            token = sequence * T + t
            if FRESH:
                trace = tl.where(tl.load(fresh + token) == 0, trace, 0.0)
            evaluation = (token * evaluations + e) * D
            a = tl.load(left + 2 * evaluation[None, :] + row[:, None], taken[None, :], other=0)
            c = tl.load(right + evaluation[:, None] + column[None, :], taken[:, None], other=0)
            total += trace * tl.dot(a, c, input_precision="tf32x3")
            factor = tl.load(records + (sequence * 2 * (T + 1) + 2 * t + WHICH) * (K + RECORD) + K + 3)
            grown = tl.load(post + token * D + row)[:, None] * tl.load(pre + token * D + column)[None, :]
            trace = factor * (fade * trace + grow * grown)
    tl.store(shares + share.to(tl.int64) * D * D + tile, total)


class Window(NamedTuple):
    """What forward leaves to backward, fp32: evaluations `[B, T, E, D]`, end points `[B, T, D]` and traces' records."""

    u: Tensor
    s: Tensor
    r: Tensor
    q: Tensor
    z: Tensor
    end: Tensor
    records: Tensor | None


class Matrices(NamedTuple):
    """Of a cell, contiguous: hidden `[2 D, D]`, tau `[D, D]` and, where it is plastic, alpha `[D, D]`, in one dtype."""

    hidden: Tensor
    tau: Tensor
    alpha_ih: Tensor | None
    alpha_hh: Tensor | None


def forward(
    x: Tensor, drive: Tensor, state: Tensor, matrices: Matrices, tau_bias: Tensor, gain: Tensor, bias: Tensor,
    epsilon: float, integration: Integration, keep: Tensor | None, fresh: Tensor | None,
    traces: tuple[Tensor, Tensor] | None, rules: Tensor | None, tiling: Tiling | None = None,
) -> tuple[Tensor, Window]:  # fmt: skip
    """States `[B, T, D]`, and what `backward` needs; all contiguous and, but for the matrices, fp32.

    rules `[6]`: eta, decay and largest norm of ih, then of hh.
    """
    B, T, D = x.shape
    kind, count = kind_of(integration), integration.evaluations
    plastic = traces is not None
    u, s, r, q, z = (x.new_empty(B, T, count, D) for _ in range(5))
    end, states = torch.empty_like(x), torch.empty_like(x)
    records = x.new_empty(B, T + 1, 2, TOKENS + RECORD) if plastic else None
    effective, scratch = (x.new_empty(B, D, D), x.new_empty(B, 2, D)) if plastic else (x, x)
    start_ih, start_hh = traces or (x, x)
    tiling = tiling or tiling_of(matrices, D, plastic)
    _forward_kernel[(B,)](
        x, drive, state, matrices.hidden, matrices.tau, tau_bias, gain, bias,
        _or(keep, x), _or(fresh, x),
        start_ih, start_hh, _or(matrices.alpha_ih, x), _or(matrices.alpha_hh, x), _or(rules, x),
        u, s, r, q, z, end, states, effective, scratch, _or(records, x),
        T, epsilon, integration.steps, count, D, kind, keep is not None, fresh is not None, plastic,
        TOKENS, RECORD, min(tiling.block, D), min(tiling.rows, D), tiling.stages, tiling.trace_stages,
        num_warps=tiling.num_warps, num_stages=1,
    )  # fmt: skip
    return states, Window(u, s, r, q, z, end, records)


def traces_after(window: Window, x: Tensor, traces: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The traces `[B, D, D]` behind the window's last token."""
    assert window.records is not None
    T, found = x.shape[1], []
    for which, (start, pre) in enumerate(zip(traces, (x, window.end), strict=True)):
        last = window.records[:, -1, which]
        weighted = window.end * last[:, :T, None]
        found.append(torch.baddbmm(start * last[:, TOKENS, None, None], weighted.mT, pre))
    return found[0], found[1]


class Gradients(NamedTuple):
    x: Tensor
    """Through the residual and the traces; what goes through the drive is not in it."""
    drive: Tensor
    state: Tensor
    fields: Tensor
    """`[B, T, E, 2 D]`, of what tanh and silu take."""
    rates: Tensor
    """`[B, T, E, D]`, of what softplus takes."""
    norm: Tensor
    """`[B, 2, D]`, of gain and bias, by sequence."""
    rules: Tensor | None
    """`[B, 6]`, by sequence."""
    traces: tuple[Tensor, Tensor] | None


def backward(
    grad_states: Tensor, grad_end: Tensor | None, grad_traces: tuple[Tensor | None, Tensor | None], x: Tensor,
    matrices: Matrices, gain: Tensor, epsilon: float, integration: Integration, keep: Tensor | None,
    fresh: Tensor | None, traces: tuple[Tensor, Tensor] | None, rules: Tensor | None, window: Window, *,
    through: bool, tiling: Tiling | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of end points and of the traces behind the window may be None.  `through` the traces' changes too."""
    B, T, D = x.shape
    kind, count = kind_of(integration), integration.evaluations
    plastic = traces is not None
    grad_x, grad_drive, grad_state = torch.empty_like(x), x.new_empty(B, T, 2 * D), x.new_empty(B, D)
    fields, rates, norm = x.new_empty(B, T, count, 2 * D), torch.empty_like(window.q), x.new_empty(B, 2, D)
    grad_rules = x.new_empty(B, 6) if plastic else x
    effective, scratch = (x.new_empty(B, D, D), x.new_empty(B, 4, D)) if plastic else (x, x)
    start_ih, start_hh = traces or (x, x)
    grad_ih, grad_hh = x, x
    if plastic and through:
        grad_ih, grad_hh = (
            torch.zeros_like(start_ih) if grad is None else grad.clone(memory_format=torch.contiguous_format)
            for grad in grad_traces
        )
    tiling = tiling or tiling_of(matrices, D, plastic)
    _backward_kernel[(B,)](
        grad_states, _or(grad_end, x), x, _or(keep, x), _or(fresh, x), matrices.hidden, matrices.tau, gain,
        start_ih, start_hh, _or(matrices.alpha_ih, x), _or(matrices.alpha_hh, x), _or(rules, x),
        window.u, window.s, window.q, window.z, window.end, _or(window.records, x),
        grad_x, grad_drive, grad_state, fields, rates, norm, grad_rules, grad_ih, grad_hh, effective, scratch,
        T, epsilon, integration.steps, count, D, kind, keep is not None, fresh is not None, grad_end is not None,
        plastic, through, TOKENS, EVALUATIONS, RECORD,
        min(tiling.block, D), min(tiling.rows, D), tiling.stages, tiling.trace_stages,
        num_warps=tiling.num_warps, num_stages=1,
    )  # fmt: skip
    return Gradients(
        grad_x, grad_drive, grad_state, fields, rates, norm,
        grad_rules if plastic else None, (grad_ih, grad_hh) if plastic and through else None,
    )  # fmt: skip


SHARES = 32
"""Of the sequences, in the gradient of alpha."""


def alpha_gradients(
    x: Tensor, fresh: Tensor | None, traces: tuple[Tensor, Tensor], rules: Tensor, window: Window, found: Gradients
) -> tuple[Tensor, Tensor]:
    """fp32 `[D, D]` of ih and hh."""
    B, T, D = x.shape
    tile, rows = min(64, D), triton.cdiv(B, SHARES)
    num_shares, parts = triton.cdiv(B, rows), []
    of_ih, of_hh = (found.drive, x, 1), (found.fields, window.u, window.u.shape[2])
    for which, (start, pre, (left, right, count)) in enumerate(
        zip(traces, (x, window.end), (of_ih, of_hh), strict=True)
    ):
        shares = x.new_empty(num_shares, D, D)
        _alpha_kernel[(D // tile, D // tile, num_shares)](
            start, window.end, pre, left, right, _or(fresh, x), window.records,
            rules, shares, B, T, rows, count,
            D, fresh is not None, which, TOKENS, EVALUATIONS, RECORD, tile, num_warps=4,
        )  # fmt: skip
        parts.append(shares.sum(0))
    return parts[0], parts[1]


def kind_of(integration: Integration) -> int:
    if integration.integrator == "exponential":
        return EXPONENTIAL
    return MIDPOINT if integration.has_midpoints else EULER


def tiling_of(matrices: Matrices, D: int, plastic: bool) -> Tiling:
    """As many columns at a time as shared memory holds of `stages` blocks of two matrices."""
    stages, itemsize = 2 if plastic and D > 256 else 3, matrices.hidden.element_size()
    column = D * stages * (itemsize + (4 if plastic else itemsize))
    block = 64
    while block > 16 and block * column > SHARED_BYTES:
        block //= 2
    return Tiling(block, rows=16, num_warps=8, stages=stages, trace_stages=2 if D <= 256 else 1)


SHARED_BYTES = 200_000
"""Of a multiprocessor, for blocks of matrices; a Hopper GPU has 227 KiB, of which a wide trace takes a part."""


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
