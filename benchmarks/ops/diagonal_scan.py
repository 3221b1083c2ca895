"""LiquidNet's diagonal scan in bf16, forward and backward, over slices of a fused projection as the layer has them."""

import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels.diagonal_scan import chunked
from lfm.kernels.diagonal_scan.op import best_path, module_of

SHAPES = ((48, 512, 384), (256, 512, 384), (4, 8192, 3072), (1, 8192, 3072))
DELTA_MIN = 1e-5
L2_BYTES = 60e6
LIMITS = {
    "forward": {"h": 3e-3, "final": 1e-4},
    "backward": {"grad gate": 6e-3, "grad bias": 6e-3, "grad value": 6e-3, "grad state": 6e-3},
}


class Scan:
    """A shape with as many sets of inputs as it takes for none to be found in the L2 cache."""

    def __init__(self, batch: int, num_positions: int, num_channels: int) -> None:
        self.shape = (batch, num_positions, num_channels)
        self.num_sets = math.ceil(2 * L2_BYTES / (2 * 2 * math.prod(self.shape)))

    def normal(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")

    @functools.cache  # noqa: B019
    def inputs(self, index: int) -> tuple[Tensor, ...]:
        """gate, bias, value, state and reset: half-lives from 1 to 4096 tokens, about a document in 200 positions."""
        batch, num_positions, num_channels = self.shape
        projected = self.normal(batch, num_positions, 3 * num_channels, seed=index).bfloat16()
        value, gate, _ = projected.chunk(3, dim=-1)
        delta = math.log(2) / torch.logspace(0, 12, num_channels, base=2, dtype=torch.float64) - DELTA_MIN
        bias = (delta + torch.log(-torch.expm1(-delta))).float().cuda()
        reset = self.normal(batch, num_positions, seed=99) > 2.6
        return gate, bias, value, self.normal(batch, num_channels, seed=98).tanh(), reset

    @functools.cache  # noqa: B019
    def upstream(self, index: int) -> tuple[Tensor, ...]:
        """h, and the gradients of h and of the final state."""
        h, final = chunked.forward(*self.inputs(index), DELTA_MIN)
        return h, self.normal(*self.shape, seed=1000 + index).bfloat16(), torch.zeros_like(final)

    def module(self, path: str | None) -> ModuleType:
        """Of `path`, or of what `backend="auto"` takes."""
        gate, _, value, _, _ = self.inputs(0)
        return module_of(path or best_path(gate, value))

    def forward(self, path: str | None = None) -> Callable[[int], object]:
        return lambda index: self.module(path).forward(*self.inputs(index), DELTA_MIN)

    def backward(self, path: str | None = None) -> Callable[[int], object]:
        return lambda index: self.module(path).backward(*self.inputs(index), *self.upstream(index), DELTA_MIN)

    def check(self, direction: str) -> dict[str, float]:
        """Against float64 on eight channels at each end."""
        gate, bias, value, state, reset = self.inputs(0)
        got = getattr(self, direction)()(0)
        found: dict[str, float] = {}
        for part in (slice(0, 8), slice(-8, None)):
            narrow = [x[..., part].double() for x in (gate, bias, value, state)]
            want = chunked.forward(*narrow, reset, DELTA_MIN)
            if direction == "backward":
                gradients = [x[..., part].double() for x in self.upstream(0)[1:]]
                want = chunked.backward(*narrow, reset, want[0], *gradients, DELTA_MIN)
            for name, a, b in zip(LIMITS[direction], got, want, strict=True):
                found[name] = max(found.get(name, 0.0), norm_ratio(a[..., part], b))
        return found

    def case(self, direction: str) -> Case:
        # Forward gate, value and h; backward those, the gradient of h, and the gradients of gate and value.
        moved = (3 if direction == "forward" else 6) * 2 * math.prod(self.shape)
        make = getattr(self, direction)
        peers = {"Triton": graphed(make("triton"), self.num_sets), "plain PyTorch": graphed(make("chunked"), 1)}
        if direction == "forward":
            peers["torch's associative_scan, compiled"] = lambda: compiled_scan(*self.inputs(0)[:3])
        name = direction + " B={} T={} D={}".format(*self.shape)
        seconds, kind = floor(0.0, moved)
        run, check = graphed(make(), self.num_sets), functools.partial(self.check, direction)
        return Case(name, run, check, LIMITS[direction], seconds, kind, flops=0.0, bytes=moved, peers=peers)


@torch.compile(dynamic=False)
def compiled_scan(gate: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """Without state and resets."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def then(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    gain = -math.expm1(-DELTA_MIN) + math.exp(-DELTA_MIN) * torch.sigmoid(gate.float() + bias)
    drive = gain * value.float().tanh()
    return associative_scan(then, (1 - gain, drive), dim=1, combine_mode="pointwise")[1].to(value.dtype)


def cases() -> list[Case]:
    return [Scan(*shape).case(direction) for shape in SHAPES for direction in ("forward", "backward")]
