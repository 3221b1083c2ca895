"""The diagonal gated scan in bf16 on a Hopper GPU, `scan.cu`: compiled at first use.  Signatures as of `chunked.py`."""

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from lfm.kernels.nvcc import HOPPER_FLAGS, compile_library, require_hopper

SOURCE = Path(__file__).with_name("scan.cu")

LONGEST_WALK = 1024
"""Positions of a sequence that one block walks through; longer ones are chained.  Bits depend on the form, so the form
depends on T alone."""
CHANNELS = 64
"""Of a column: what one block takes of a sequence."""


def supports(gate: Tensor, value: Tensor) -> bool:
    """Whether the kernels take such inputs, on a device that has them.  They copy rows in vectors of 16 bytes."""
    return gate.dtype == value.dtype == torch.bfloat16 and value.shape[-1] % 8 == 0


def forward(
    gate: Tensor, bias: Tensor, value: Tensor, state: Tensor | None, reset: Tensor | None, delta_min: float
) -> tuple[Tensor, Tensor]:
    """As `chunked.forward`, for inputs that are supported."""
    h = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    final = torch.empty(value[:, 0].shape, dtype=torch.float32, device=value.device)
    _launch(gate, bias, value, state, reset, None, None, None, h, None, final, None, delta_min)
    return h, final


def backward(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    h: Tensor,
    grad_h: Tensor,
    grad_final: Tensor,
    delta_min: float,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.backward`, for inputs that are supported.

    into: where the gradients of gate and value go, slices of one wider tensor's rows.
    """
    B, T, D = value.shape
    if into is None:
        into = (value.new_empty((B, T, D)), value.new_empty((B, T, D)))
    grad_gate, grad_value = into
    row = grad_gate.stride(1)
    assert all(x.stride() == (T * row, row, 1) and x.data_ptr() % 4 == 0 and row % 2 == 0 for x in into), "one tensor's"
    grad_state = torch.empty((B, D), dtype=torch.float32, device=value.device)
    num_parts = B * (_num_tiles(value, backward=True) if T > LONGEST_WALK else 1)
    bias_parts = torch.empty((num_parts, D), dtype=torch.float32, device=value.device)
    _launch(
        gate, bias, value, state, reset, _dense(h), _rows(grad_h), grad_final,
        grad_gate, grad_value, grad_state, bias_parts, delta_min,
    )  # fmt: skip
    return grad_gate, bias_parts.sum(0), grad_value, grad_state


def _launch(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    h: Tensor | None,
    grad_h: Tensor | None,
    grad_final: Tensor | None,
    output: Tensor,
    grad_value: Tensor | None,
    final: Tensor,
    bias_parts: Tensor | None,
    delta_min: float,
) -> None:
    """Start one direction on the current stream; it is the backward where h is given."""
    if not (value.is_cuda and supports(gate, value)):
        raise ValueError(
            f"backend='cuda' takes bf16 gate and value on a GPU and a multiple of 8 channels; gate is {gate.dtype} and "
            f"value {value.dtype} of {value.shape[-1]} channels on {value.device}; backend='auto' takes any"
        )
    gate, value = _rows(gate), _rows(value)
    B, T, D = value.shape
    device, is_backward, is_chained = value.device, h is not None, T > LONGEST_WALK
    num_tiles, num_columns = _num_tiles(value, backward=is_backward), B * -(-D // CHANNELS)
    folds = group_ends = words = None
    slots = _resident_blocks(device.index, is_backward, is_chained)
    if is_chained:
        words = torch.zeros(num_columns * num_tiles + 1, dtype=torch.int32, device=device)
        folds = torch.empty(num_columns * num_tiles * CHANNELS * 2, dtype=torch.float32, device=device)
        group_ends = torch.empty(num_columns * num_tiles * CHANNELS, dtype=torch.float32, device=device)
        grid = min(slots, num_columns * num_tiles)
    else:
        # As many columns for every block, or one less for some: no block works alone at the end.
        grid = -(-num_columns // -(-num_columns // slots))
    single = [x if x is None else _dense(x.float()) for x in (bias, state, grad_final)]
    reset = None if reset is None else reset.contiguous()
    tickets = None if words is None else words[-1:]
    given = (gate, value, h, grad_h, *single, reset, output, grad_value, final, bias_parts)
    pointers = [x if x is None else x.data_ptr() for x in (*given, folds, group_ends, words, tickets)]
    strides = [(0, 0) if x is None else x.stride()[:2] for x in (gate, value, grad_h)]
    rows = (*(row for _, row in strides), output.stride(1))
    sizes = (*(batch for batch, _ in strides), *rows, T, D, num_columns, num_tiles)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        error = library().diagonal_scan_launch(
            device.index, is_backward, is_chained, grid, *pointers, *sizes,
            math.exp(-delta_min), -math.expm1(-delta_min), stream,
        )  # fmt: skip
    _check(error)


def _rows(x: Tensor) -> Tensor:
    """With vectors of 16 bytes side by side; the rows of a wider tensor may stay where they are."""
    vector = 16 // x.element_size()
    is_aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    fits = all(stride % vector == 0 for stride in x.stride()[:-1]) and x.stride(1) < 2**31
    return x if is_aligned and fits else _dense(x)


def _dense(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _num_tiles(value: Tensor, *, backward: bool) -> int:
    tile, _ = _tiling(value.device.index, backward, value.shape[1] > LONGEST_WALK)
    return -(-value.shape[1] // tile)


def _resident_blocks(device_index: int, backward: bool, chained: bool) -> int:
    """How many blocks the device holds at once."""
    multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return _tiling(device_index, backward, chained)[1] * multiprocessors


@functools.cache
def _tiling(device_index: int, backward: bool, chained: bool) -> tuple[int, int]:
    """Positions of a tile, and how many blocks a multiprocessor holds at once."""
    require_hopper(torch.device("cuda", device_index))
    tile, blocks = ctypes.c_int(0), ctypes.c_int(0)
    with torch.cuda.device(device_index):
        _check(
            library().diagonal_scan_tiling(device_index, backward, chained, ctypes.byref(tile), ctypes.byref(blocks))
        )
    return tile.value, blocks.value


def _check(error: int) -> None:
    if error != 0:
        reason = library().diagonal_scan_error(error).decode()
        raise RuntimeError(f"the diagonal scan's kernel: CUDA error {error}, {reason}")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; compiles them unless those of this source are in torch's cache of extensions."""
    library = ctypes.CDLL(str(compile_library(SOURCE, HOPPER_FLAGS)))
    pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    library.diagonal_scan_launch.argtypes = (
        [integer] * 4 + [pointer] * 16 + [long] * 3 + [integer] * 8 + [real] * 2 + [pointer]
    )
    library.diagonal_scan_tiling.argtypes = [integer] * 3 + [ctypes.POINTER(integer)] * 2
    library.diagonal_scan_error.restype = ctypes.c_char_p
    return library
