"""LFM-3B's reservoirs: both sweeps of the recurrence, and the liquid layer around them with all its gradients; and the
fp32 reservoir of LAERC's OpenWebText preset."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from benchmarks.ops.case import COPY_BYTES_PER_SECOND, FP32_FLOPS_PER_SECOND, Case, floor, graphed, norm_ratio
from lfm.kernels.reservoir import RecurrenceStats, cluster, cluster_fp32, make_reservoir
from lfm.kernels.reservoir.chunked import (
    backward_sweep,
    forward_sweep,
    graphed_backward_sweep,
    graphed_forward_sweep,
    weight_gradient,
)
from lfm.kernels.reservoir.grid import ChunkPlan, Outcome
from lfm.layers.liquid import Liquid, ReservoirConfig

T, R, N, D = 8192, 3, 512, 3072
LEAK_RATE, CHUNK_LENGTH = 0.3, 128
ONE_WAVE = {1: 103, 2: 205, 8: 410}
"""Batch -> the shortest chunks that one wave of clusters on an H200 holds: 8 abreast up to a batch of 2, else 16."""


@functools.cache
def matrices() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([make_reservoir(N, 0.1, 0.99, generator) for _ in range(R)]).cuda()


class Recurrence:
    """Inputs of a batch, and the exact results for them in float64."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def normal(self, *, seed: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(self.batch, T, R, N, generator=generator, device="cuda").bfloat16()

    @functools.cached_property
    def drive(self) -> Tensor:
        return self.normal(seed=1)

    @functools.cached_property
    def grad_states(self) -> Tensor:
        return self.normal(seed=2)

    @functools.cached_property
    def weight(self) -> Tensor:
        return matrices().bfloat16()

    @functools.cached_property
    def gain(self) -> Tensor:
        return cluster.forward_op(self.drive, self.weight, None, None, LEAK_RATE, T, 0, math.inf, 0, True, False)[1]

    @functools.cached_property
    def grad_final(self) -> Tensor:
        return torch.zeros(self.batch, R, N, device="cuda")

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        plan = ChunkPlan(T, 0, math.inf, 0)
        drive, grad_states, weight = self.drive.double(), self.grad_states.double(), self.weight.double()
        states, gain, _ = forward_sweep(drive, weight, None, None, LEAK_RATE, plan, with_gain=True)
        assert gain is not None
        args = (grad_states, self.grad_final.double(), gain, weight, None, LEAK_RATE, plan)
        delta, _ = backward_sweep(*args)
        return {"states": states, "delta": delta, "weight gradient": weight_gradient(delta, states, None, None)}

    def cases(self, chunk_length: int, warmup: int) -> list[Case]:
        plan = ChunkPlan(chunk_length, warmup, math.inf, 0)
        # Guard, idle repairs and statistics included, as a training step runs them.
        cut = (LEAK_RATE, chunk_length, warmup, 1e-2, 3)

        def forward() -> tuple[Tensor, ...]:
            return cluster.forward_op(self.drive, self.weight, None, None, *cut, True, True)

        def backward() -> tuple[Tensor, ...]:
            args = (self.grad_states, self.gain, self.weight, self.grad_final, None)
            return cluster.backward_op(*args, *cut)

        def forward_peer() -> tuple[Tensor, Tensor | None, Outcome]:
            return graphed_forward_sweep(self.drive, self.weight, None, None, LEAK_RATE, plan)

        def backward_peer() -> tuple[Tensor, Outcome]:
            args = (self.grad_states, self.grad_final, self.gain, self.weight, None, LEAK_RATE, plan)
            return graphed_backward_sweep(*args)

        def check_forward() -> dict[str, float]:
            return {"states": norm_ratio(forward()[0], self.exact["states"])}

        def check_backward() -> dict[str, float]:
            delta, states = backward()[0], forward()[0]
            gradient = weight_gradient(delta, states, None, None)
            return {
                "delta": norm_ratio(delta, self.exact["delta"]),
                "weight gradient": norm_ratio(gradient, self.exact["weight gradient"]),
            }

        def case(name: str, run: Callable, check: Callable, limits: dict[str, float], peer: Callable) -> Case:
            flops, moved = 2 * self.batch * T * R * N * N, 3 * self.batch * T * R * N * 2 + R * N * N * 2
            name = f"{name} B={self.batch} L={chunk_length} w={warmup}"
            peers = {"chunked, CUDA graph": peer}
            return Case(name, run, check, limits, *floor(flops, moved), flops=flops, bytes=moved, peers=peers)

        backward_limits = {"delta": 4e-3, "weight gradient": 5e-3}
        return [
            case("forward", forward, check_forward, {"states": 3e-3}, forward_peer),
            case("backward", backward, check_backward, backward_limits, backward_peer),
        ]


class Layer:
    """The liquid layer from its input to every gradient, guard included, as a training step runs it."""

    def __init__(self, batch: int, chunk_length: int | Literal["fill"]) -> None:
        self.batch, self.chunk_length = batch, chunk_length

    @functools.cached_property
    def layer(self) -> Liquid:
        with torch.device("cuda"):
            config = ReservoirConfig(train_reservoir=True, chunk_length=self.chunk_length)
            layer = Liquid(D, config).bfloat16()
        layer.reservoirs = torch.nn.Parameter(matrices().float())
        layer.connections = layer.reservoirs != 0
        generator = torch.Generator("cuda").manual_seed(3)
        for linear in (layer.input, layer.output):
            torch.nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5, generator=generator)
            torch.nn.init.zeros_(linear.bias)
        return layer

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(4)
        drawn = [torch.randn(self.batch, T, D, generator=generator, device="cuda").bfloat16() for _ in range(2)]
        return drawn[0].requires_grad_(), drawn[1]

    def gradients(self, layer: Liquid, u: Tensor, grad: Tensor) -> dict[str, Tensor]:
        y, _ = layer(u, stats=RecurrenceStats())
        leaves = {"input": u, **dict(layer.named_parameters())}
        found = torch.autograd.grad(y, list(leaves.values()), grad)
        return {"output": y.detach()} | {f"grad {name}": x for name, x in zip(leaves, found, strict=True)}

    def run(self) -> dict[str, Tensor]:
        return self.gradients(self.layer, *self.inputs)

    def check(self) -> dict[str, float]:
        exact = Liquid(D, ReservoirConfig(train_reservoir=True, backend="sequential")).cuda().double()
        exact.load_state_dict(self.layer.state_dict())
        # The product takes W in bf16, and that is the W whose gradient is compared.
        exact.reservoirs.data = exact.reservoirs.data.bfloat16().double()
        u, grad = self.inputs
        want = self.gradients(exact, u.detach().double().requires_grad_(), grad.double())
        return {name: norm_ratio(got, want[name]) for name, got in self.run().items()}

    def case(self) -> Case:
        rows = self.batch * T
        flops = 3 * (2 * 2 * rows * D * R * N + 2 * rows * R * N * N)
        # Forward u, drive, states, gain and y; backward the same again with gradients.
        moved = 2 * 2 * rows * (2 * D + 3 * R * N) + 2 * 2 * 2 * D * R * N
        names = ["output", "grad input"] + [f"grad {name}" for name, _ in self.layer.named_parameters()]
        limits = dict.fromkeys(names, 1e-2)
        name = f"layer, forward + backward B={self.batch} L={self.chunk_length}"
        run = graphed(lambda _: self.run())
        return Case(name, run, self.check, limits, *floor(flops, moved), flops=flops, bytes=moved)


class LAERC:
    """One layer's frozen reservoir: leak 1, sequential, fp32.  torch.nn.RNN is the same recurrence with an input
    projection before it."""

    batch, num_positions, num_units, hidden_size = 64, 128, 256, 64
    plan = ChunkPlan(num_positions, 0, math.inf, 0)

    def normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(shape, generator=generator, device="cuda")

    @functools.cached_property
    def weight(self) -> Tensor:
        weight = self.normal(1, self.num_units, self.num_units, seed=1)
        return weight * (0.9 / torch.linalg.matrix_norm(weight, 2))

    @functools.cached_property
    def drive(self) -> Tensor:
        return self.normal(self.batch, self.num_positions, 1, self.num_units, seed=2)

    @functools.cached_property
    def grad_states(self) -> Tensor:
        return self.normal(self.batch, self.num_positions, 1, self.num_units, seed=3)

    @functools.cached_property
    def gain(self) -> Tensor:
        gain = cluster_fp32.forward_sweep(self.drive, self.weight, None, None, 1.0, self.plan, with_gain=True)[1]
        assert gain is not None
        return gain

    @functools.cached_property
    def grad_final(self) -> Tensor:
        return torch.zeros(self.batch, 1, self.num_units, device="cuda")

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.double()
        states, gain, _ = forward_sweep(self.drive.double(), weight, None, None, 1.0, self.plan, with_gain=True)
        assert gain is not None
        args = (self.grad_states.double(), self.grad_final.double(), gain, weight, None, 1.0, self.plan)
        return states, backward_sweep(*args)[0]

    @functools.cached_property
    def rnn(self) -> tuple[torch.nn.RNN, Tensor, Tensor]:
        torch.backends.cudnn.allow_tf32 = False
        rnn = torch.nn.RNN(self.hidden_size, self.num_units, batch_first=True, device="cuda").requires_grad_(False)
        rnn.weight_hh_l0.copy_(self.weight[0])
        x = self.normal(self.batch, self.num_positions, self.hidden_size, seed=4).requires_grad_()
        return rnn, x, rnn(x)[0]

    def forward(self) -> Tensor:
        return cluster_fp32.forward_sweep(self.drive, self.weight, None, None, 1.0, self.plan, with_gain=True)[0]

    def backward(self) -> Tensor:
        args = (self.grad_states, self.grad_final, self.gain, self.weight, None, 1.0, self.plan)
        return cluster_fp32.backward_sweep(*args)[0]

    def cases(self) -> list[Case]:
        def forward_peer() -> object:
            return graphed_forward_sweep(self.drive, self.weight, None, None, 1.0, self.plan)

        def backward_peer() -> object:
            args = (self.grad_states, self.grad_final, self.gain, self.weight, None, 1.0, self.plan)
            return graphed_backward_sweep(*args)

        def forward_rnn() -> object:
            rnn, x, _ = self.rnn
            return rnn(x)

        def backward_rnn() -> object:
            _, x, states = self.rnn
            return torch.autograd.grad(states, x, self.grad_states[:, :, 0], retain_graph=True)

        def check_forward() -> dict[str, float]:
            return {"states": norm_ratio(self.forward(), self.exact[0])}

        def check_backward() -> dict[str, float]:
            return {"delta": norm_ratio(self.backward(), self.exact[1])}

        tokens, N = self.batch * self.num_positions, self.num_units
        flops, moved = 2 * tokens * N * N, (3 * tokens * N + N * N) * 4
        seconds = max(flops / FP32_FLOPS_PER_SECOND, moved / COPY_BYTES_PER_SECOND)

        def case(name: str, run: Callable, check: Callable, limits: dict[str, float], *peers: Callable) -> Case:
            name = f"fp32 {name} B={self.batch} T={self.num_positions} N={N}"
            named = dict(zip(("sequential, CUDA graph", "torch.nn.RNN (cuDNN)"), peers, strict=True))
            return Case(name, run, check, limits, seconds, "flops", flops=flops, bytes=moved, peers=named)

        return [
            case("forward", self.forward, check_forward, {"states": 2e-6}, forward_peer, forward_rnn),
            case("backward", self.backward, check_backward, {"delta": 5e-6}, backward_peer, backward_rnn),
        ]


def cases() -> list[Case]:
    found = LAERC().cases()
    for batch in (1, 2, 8):
        recurrence = Recurrence(batch)
        for chunk_length, warmup in ((CHUNK_LENGTH, 64), (CHUNK_LENGTH, 192), (ONE_WAVE[batch], 64)):
            found += recurrence.cases(chunk_length, warmup)
        found += [Layer(batch, CHUNK_LENGTH).case(), Layer(batch, "fill").case()]
    return found
