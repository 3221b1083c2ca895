"""Triton kernels of SwiGLU's activation.  A program owns a tile of ROWS x COLUMNS outputs.

The width is cut by 128, which divides the usual ones: whole rows in a power of two would leave lanes idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, NUM_WARPS = 16, 128, 4


@triton.jit
def _tile(m, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers in int64, columns, and which of them exist."""
    num_column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // num_column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < m) & (column < WIDTH)


@triton.jit
def _swiglu_fwd_kernel(gate_up, out, scale, m, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, exists = _tile(m, WIDTH, ROWS, COLUMNS)
    source = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(source, exists, other=0).to(tl.float32)
    up = tl.load(source + WIDTH, exists, other=0).to(tl.float32)
    tl.store(out + row * WIDTH + column, scale * (gate * tl.sigmoid(gate) * up), exists)


@triton.jit
def _swiglu_bwd_kernel(
    grad, gate_up, grad_gate_up, scale, m, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, exists = _tile(m, WIDTH, ROWS, COLUMNS)
    at = row * (2 * WIDTH) + column
    g = scale * tl.load(grad + row * WIDTH + column, exists, other=0).to(tl.float32)
    gate = tl.load(gate_up + at, exists, other=0).to(tl.float32)
    up = tl.load(gate_up + at + WIDTH, exists, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_gate_up + at, g * up * sigmoid * (1 + gate * (1 - sigmoid)), exists)
    tl.store(grad_gate_up + at + WIDTH, g * gate * sigmoid, exists)


def swiglu_forward(gate_up: Tensor, scale: float) -> Tensor:
    """`[..., 2F]`, contiguous -> `[..., F]`."""
    m, width = gate_up.shape[:-1].numel(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        _swiglu_fwd_kernel[_grid(m, width)](gate_up, out, scale, m, width, ROWS, COLUMNS, num_warps=NUM_WARPS)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, scale: float) -> Tensor:
    """Gradient of `gate_up`, from contiguous tensors."""
    m, width = grad.shape[:-1].numel(), grad.shape[-1]
    grad_gate_up = torch.empty_like(gate_up)
    if grad.numel():
        sizes = (m, width, ROWS, COLUMNS)
        _swiglu_bwd_kernel[_grid(m, width)](grad, gate_up, grad_gate_up, scale, *sizes, num_warps=NUM_WARPS)
    return grad_gate_up


def _grid(m: int, width: int) -> tuple[int]:
    return (triton.cdiv(m, ROWS) * triton.cdiv(width, COLUMNS),)
