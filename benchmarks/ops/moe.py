"""LFM-3B's mixture of experts: the whole layer with routing and all gradients, and its memory-bound pieces alone."""

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.ops.case import Case, floor, graphed, norm_ratio
from lfm.kernels import backend
from lfm.kernels.permutation import kernel as moves
from lfm.kernels.permutation import sorted_places
from lfm.kernels.permutation.reference import (
    combine_backward_reference,
    combine_reference,
    dispatch_reference,
    sorted_places_reference,
)
from lfm.kernels.router import Choice, choose_experts, router_logits, row_means
from lfm.kernels.router.reference import choose_experts_reference, router_logits_reference
from lfm.kernels.swiglu import kernel as activation
from lfm.kernels.swiglu.reference import swiglu_reference
from lfm.layers.moe import MoE, MoEConfig

N, D, F, E, K = 8192, 3072, 1408, 8, 2
M = N * K


@functools.cache
def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()


@functools.cache
def layer(dtype: torch.dtype) -> MoE:
    """Gates, values and routing logits of standard deviation 1, the same weights in any dtype."""
    moe = MoE(D, MoEConfig(num_moe_experts=E, moe_router_topk=K, moe_ffn_hidden_size=F)).to("cuda", dtype)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(moe.named_parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed, scale=(F if name == "down" else D) ** -0.5))
    return moe


def outputs_and_grads(dtype: torch.dtype) -> dict[str, Tensor]:
    moe = layer(dtype)
    x = normal(1, N, D, seed=10).to(dtype).requires_grad_()
    y, _ = moe(x)
    named = {"x": x, **dict(moe.named_parameters())}
    grads = torch.autograd.grad(y, list(named.values()), normal(1, N, D, seed=11).to(dtype))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


def unfused() -> dict[str, Tensor]:
    with mock.patch.object(backend, "_triton_is_installed", lambda: False):
        return outputs_and_grads(torch.bfloat16)


def dense_products() -> None:
    """The same FLOPs as the experts', forward and backward, as six products of one expert each."""
    x, gate_up, down = normal(M, D, seed=20), normal(2 * F, D, seed=21), normal(D, F, seed=22)
    wide, hidden = normal(M, 2 * F, seed=23), normal(M, F, seed=24)
    x @ gate_up.T, hidden @ down.T
    x @ down, x.T @ hidden
    wide @ gate_up, wide.T @ x


def check_layer() -> dict[str, float]:
    got, want = outputs_and_grads(torch.bfloat16), outputs_and_grads(torch.float64)
    return {name: norm_ratio(got[name], want[name]) for name in want}


def piece(
    name: str, run: Callable[[], Tensor | tuple[Tensor, ...]], plain: Callable, inputs: list[Tensor], moved: float
) -> Case:
    """A kernel against its definition in fp64: `plain(*inputs)`, which in bf16 is its peer."""

    def results(found: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {str(i): part for i, part in enumerate(found if isinstance(found, tuple) else (found,))}

    def check() -> dict[str, float]:
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        got, want = results(run()), results(plain(*exact))
        return {name: norm_ratio(got[name], want[name]) for name in want}

    limits = {output: 3e-3 for output in ("0", "1")[: 2 if name == "combine, backward" else 1]}
    peers = {"plain PyTorch": graphed(lambda _: plain(*inputs))}
    return Case(name, graphed(lambda _: run()), check, limits, *floor(0, moved), 0, moved, peers)


def swiglu_grad(grad: Tensor, gate_up: Tensor) -> Tensor:
    with torch.enable_grad():
        gate_up = gate_up.detach().requires_grad_()
        return torch.autograd.grad(swiglu_reference(gate_up), gate_up, grad)[0]


def routing(logits_of: Callable, choose: Callable, dtype: torch.dtype) -> dict[str, Tensor]:
    """The router alone: weights, and the gradients of x and of its matrix."""
    leaves = [normal(1, N, D, seed=40), normal(E, D, seed=41, scale=D**-0.5)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    choice = Choice(*choose(logits_of(*leaves), K))
    outputs = [choice.weights, *row_means(choice.means)[::2]]  # probability and z
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) * x.detach() for x in outputs])
    return {"weights": choice.weights.detach(), "x": grads[0], "router.weight": grads[1]}


def fused_routing() -> dict[str, Tensor]:
    return routing(lambda *leaves: router_logits(*leaves)[0], choose_experts, torch.bfloat16)


def plain_routing() -> dict[str, Tensor]:
    return routing(router_logits_reference, choose_experts_reference, torch.bfloat16)


def check_routing() -> dict[str, float]:
    got, want = fused_routing(), routing(router_logits_reference, choose_experts_reference, torch.float64)
    return {name: norm_ratio(got[name], want[name]) for name in want}


def cases() -> list[Case]:
    flops = 18.0 * M * D * F + 6.0 * N * D * E
    moved = 2.0 * (4 * N * D + 2 * E * 3 * D * F)
    limits = {"y": 6e-3, "x": 1e-2, "router.weight": 2e-2, "gate_up": 1e-2, "down": 1e-2}
    keys = torch.rand(N, E, generator=torch.Generator().manual_seed(0)).topk(K).indices.flatten().cuda()
    place = sorted_places(keys, E + 1).view(N, K)
    weights = torch.rand(N, K, generator=torch.Generator().manual_seed(1)).cuda()
    x, grad, rows = normal(N, D, seed=30), normal(N, D, seed=31), normal(M, D, seed=32)
    gate_up, grad_hidden = normal(M, 2 * F, seed=33), normal(M, F, seed=34)
    return [
        Case(
            "layer, forward + backward",
            graphed(lambda _: outputs_and_grads(torch.bfloat16)),
            check_layer,
            limits,
            *floor(flops, moved),
            flops,
            moved,
            {"dense products": graphed(lambda _: dense_products()), "unfused": graphed(lambda _: unfused())},
        ),
        Case(
            "router, forward + backward",
            graphed(lambda _: fused_routing()),
            check_routing,
            {"weights": 1e-5, "x": 5e-3, "router.weight": 5e-3},
            *floor(6.0 * N * D * E, 6.0 * N * D),
            6.0 * N * D * E,
            6.0 * N * D,
            {"plain PyTorch": graphed(lambda _: plain_routing())},
        ),
        piece("sort", lambda: sorted_places(keys, E + 1), sorted_places_reference, [keys], 16.0 * M),
        piece("dispatch", lambda: moves.dispatch_forward(x, place), dispatch_reference, [x, place], 2.0 * (N + M) * D),
        piece(
            "combine",
            lambda: moves.combine_forward(rows, place, weights),
            combine_reference,
            [rows, place, weights],
            2.0 * (N + M) * D,
        ),
        piece(
            "combine, backward",
            lambda: moves.combine_backward(grad, rows, place, weights),
            combine_backward_reference,
            [grad, rows, place, weights],
            2.0 * (N + 2 * M) * D,
        ),
        piece("swiglu", lambda: activation.swiglu_forward(gate_up), swiglu_reference, [gate_up], 6.0 * M * F),
        piece(
            "swiglu, backward",
            lambda: activation.swiglu_backward(grad_hidden, gate_up),
            swiglu_grad,
            [grad_hidden, gate_up],
            10.0 * M * F,
        ),
    ]
