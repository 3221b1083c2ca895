"""Triton kernels of the gate behind the scan.  A program owns ROWS x COLUMNS; gates are rows of a wider tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, NUM_WARPS = 16, 128, 4


@triton.jit
def _tile(m, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers in int64, columns, and which of them exist."""
    num_column_blocks = tl.cdiv(D, COLUMNS)
    row = (tl.program_id(0) // num_column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < m) & (column < D)


@triton.jit
def _gate_fwd_kernel(gate, h, out, scale, m, D, gate_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, exists = _tile(m, D, ROWS, COLUMNS)
    open = tl.sigmoid(tl.load(gate + row * gate_row + column, exists, other=0).to(tl.float32))
    x = tl.load(h + row * D + column, exists, other=0).to(tl.float32)
    tl.store(out + row * D + column, scale * open * x, exists)


@triton.jit
def _gate_bwd_kernel(
    grad, gate, h, to_gate, to_h, scale, m, D, gate_row, to_gate_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, exists = _tile(m, D, ROWS, COLUMNS)
    open = tl.sigmoid(tl.load(gate + row * gate_row + column, exists, other=0).to(tl.float32))
    x = tl.load(h + row * D + column, exists, other=0).to(tl.float32)
    g = scale * tl.load(grad + row * D + column, exists, other=0).to(tl.float32)
    tl.store(to_h + row * D + column, g * open, exists)
    tl.store(to_gate + row * to_gate_row + column, g * x * open * (1 - open), exists)


def gate_forward(gate: Tensor, h: Tensor, scale: float) -> Tensor:
    """`scale sigmoid(gate) h`: gate `[B, T, D]`, one stride for all of its rows, h contiguous."""
    out, D = torch.empty_like(h), h.shape[-1]
    m = h.shape[:-1].numel()
    _gate_fwd_kernel[_grid(m, D)](gate, h, out, scale, m, D, gate.stride(1), ROWS, COLUMNS, num_warps=NUM_WARPS)
    return out


def gate_backward(grad: Tensor, gate: Tensor, h: Tensor, to_gate: Tensor, scale: float) -> Tensor:
    """The gradient of h; that of gate goes to `to_gate`, rows of a wider tensor as gate's are."""
    to_h, m, D = torch.empty_like(h), h.shape[:-1].numel(), h.shape[-1]
    _gate_bwd_kernel[_grid(m, D)](
        grad, gate, h, to_gate, to_h, scale, m, D, gate.stride(1), to_gate.stride(1), ROWS, COLUMNS, num_warps=NUM_WARPS
    )
    return to_h


def _grid(m: int, D: int) -> tuple[int]:
    return (triton.cdiv(m, ROWS) * triton.cdiv(D, COLUMNS),)
