"""`diagonal_scan`: checks, the choice of path, and its registration with torch."""

import warnings
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from lfm.kernels.diagonal_scan import chunked, cuda

Backend = Literal["auto", "cuda", "triton", "chunked"]


def diagonal_scan(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    delta_min: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = alpha_t h_{t-1} + (1 - alpha_t) tanh(value_t)` a channel; the equation is in `reference.py`.

    gate: `[B, T, D]`; alpha = exp(-delta) with delta = softplus(gate + bias) + delta_min, whose half-life is
        ln 2 / delta tokens.
    bias: `[D]`, at least fp32: half-lives of thousands of tokens do not fit into bf16.
    value: `[B, T, D]`, before its tanh.  gate and value may be slices of one wider projection, as they lie.
    state: `[B, D]`, the state before position 0; None is zero.
    reset: bool `[B, T]` or None; True where a document starts: nothing is carried into that position.
    delta_min: the smallest decay rate.

    Returns h `[B, T, D]` in value's dtype and the final state `[B, D]`, fp32 (float64 if gate or value is).  Everything
    in between is at least fp32 whatever gate and value are.  Both results carry gradients to all four inputs.

    "cuda" is for bf16 on Hopper GPUs, "triton" for GPUs and fp32 or less, "chunked" is plain PyTorch; "auto" is the
    first that takes the inputs and, once per process, was seen to agree with the last.  A GPU's first call waits for
    that comparison, so it cannot be recorded in a CUDA graph.
    """
    _check(gate, bias, value, state, reset, delta_min)
    if backend not in ("auto", "cuda", "triton", "chunked"):
        raise ValueError(f"backend={backend!r} is not one of 'auto', 'cuda', 'triton', 'chunked'")
    path = best_path(gate, value) if backend == "auto" else backend
    return torch.ops.lfm.diagonal_scan(gate, bias, value, state, reset, delta_min, path)


@torch.library.custom_op("lfm::diagonal_scan", mutates_args=())
def _scan(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    delta_min: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    return module_of(path).forward(gate, bias, value, state, reset, delta_min)


@torch.library.custom_op("lfm::diagonal_scan_backward", mutates_args=())
def _scan_backward(
    gate: Tensor,
    bias: Tensor,
    value: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    h: Tensor,
    grad_h: Tensor,
    grad_final: Tensor,
    delta_min: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return module_of(path).backward(gate, bias, value, state, reset, h, grad_h, grad_final, delta_min)


def module_of(path: str) -> ModuleType:
    if path == "triton":
        from lfm.kernels.diagonal_scan import kernel

        return kernel
    return cuda if path == "cuda" else chunked


@_scan.register_fake
def _(
    gate: Tensor, bias: Tensor, value: Tensor, state: Tensor | None, reset: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(gate.dtype, value.dtype), torch.float32)
    return value.new_empty(value.shape), value.new_empty(value[:, 0].shape, dtype=wide)


@_scan_backward.register_fake
def _(gate: Tensor, bias: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(gate.dtype, value.dtype), torch.float32)
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(bias.shape, dtype=wide),
        value.new_empty(value.shape),
        value.new_empty(value[:, 0].shape, dtype=wide),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gate, bias, value, state, reset, ctx.delta_min, ctx.path = inputs
    ctx.save_for_backward(gate, bias, value, state, reset, output[0])


def _gradient(ctx: Any, grad_h: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    gate, bias, value, state, reset, h = ctx.saved_tensors
    grad_gate, grad_bias, grad_value, grad_state = torch.ops.lfm.diagonal_scan_backward(
        gate, bias, value, state, reset, h, grad_h, grad_final, ctx.delta_min, ctx.path
    )
    grad_state = grad_state.to(state.dtype) if state is not None else None
    return grad_gate, grad_bias.to(bias.dtype), grad_value, grad_state, None, None, None


_scan.register_autograd(_gradient, setup_context=_keep)

_best_paths: dict[tuple[Any, ...], str] = {}


def best_path(gate: Tensor, value: Tensor) -> str:
    """The fastest path that takes the inputs and equals the plain one here: found out by the first call of its kind."""
    if not value.is_cuda or torch.float64 in (gate.dtype, value.dtype):
        return "chunked"
    _, num_positions, num_channels = value.shape
    long = num_positions > cuda.LONGEST_WALK
    candidates = ("cuda", "triton") if cuda.supports(gate, value) else ("triton",)
    key = (value.device, gate.dtype, value.dtype, long, candidates)
    if key not in _best_paths:
        _best_paths[key] = first_that_agrees(candidates, *key[:3], num_channels, long=long)
    return _best_paths[key]


def first_that_agrees(
    candidates: tuple[str, ...],
    device: torch.device,
    gate_dtype: torch.dtype,
    value_dtype: torch.dtype,
    num_channels: int,
    *,
    long: bool,
) -> str:
    """Of the paths the first whose kernels equal the plain one, else the plain one; a warning names what failed."""
    failures = []
    for path in candidates:
        failure = disagreement(path, device, gate_dtype, value_dtype, num_channels, long=long)
        if failure is None:
            break
        failures.append(f"the {path} kernels {failure}")
    else:
        path = "chunked"
    if failures:
        warnings.warn(
            f"diagonal_scan on {device}: {'; '.join(failures)}; this process takes the slower {path} path",
            RuntimeWarning,
            stacklevel=4,
        )
    return path


@torch.no_grad()
def disagreement(
    path: str,
    device: torch.device,
    gate_dtype: torch.dtype,
    value_dtype: torch.dtype,
    num_channels: int,
    *,
    long: bool,
) -> str | None:
    """What is wrong with a path's kernels for short or long sequences, seen with resets, a state and a ragged end."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    bound = 1e-4 if gate_dtype == value_dtype == torch.float32 else 1e-2
    names = ("h", "the final state", "the gradient of gate", "of bias", "of value", "of state")
    try:
        num_positions = 131 + (module_of(path).LONGEST_WALK if long else 0)
        shape = (2, num_positions, num_channels)
        gate, value = draw(*shape, dtype=gate_dtype), draw(*shape, dtype=value_dtype)
        bias, state, reset = 3 * draw(num_channels) - 4, draw(2, num_channels).tanh(), draw(2, num_positions) > 2
        inputs = (gate, bias, value, state, reset)
        upstream = (draw(*shape, dtype=value_dtype), draw(2, num_channels))
        # Any states do for the gradients: the same ones for both.
        got, want = (
            (*module.forward(*inputs, 1e-5), *module.backward(*inputs, value, *upstream, 1e-5))
            for module in (module_of(path), chunked)
        )
        for name, a, b in zip(names, got, want, strict=True):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            if not error < bound:
                return f"are off by {error:.1e} in {name}"
    except Exception as error:  # a compiler's or a driver's, of any class
        return f"fail with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _check(
    gate: Tensor, bias: Tensor, value: Tensor, state: Tensor | None, reset: Tensor | None, delta_min: float
) -> None:
    if value.dim() != 3 or value.numel() == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}; it needs [B, T, D] with no empty dimension")
    batch, num_positions, num_channels = value.shape
    expected = {
        "gate": (gate, (batch, num_positions, num_channels)),
        "bias": (bias, (num_channels,)),
        "state": (state, (batch, num_channels)),
        "reset": (reset, (batch, num_positions)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but value [B, T, D] of {tuple(value.shape)} needs {shape}"
            )
    for name, tensor in (("gate", gate), ("value", value)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating dtype")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}; it must be bool")
    for name, tensor in (("bias", bias), ("state", state)):
        if tensor is not None and torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be at least float32")
    if delta_min < 0:
        raise ValueError(f"delta_min={delta_min} must not be negative")
