"""Weight gradients that wait, and pipelines that make them between their transfers."""

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")

from torch import Tensor, nn

from lfm.job.fork import run_ranks
from lfm.kernels.gradient_sum import GradientSum, gradient_sum
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.parallel.later import LaterProducts
from lfm.parallel.megatron import transformer_config
from lfm.parallel.stage import ModelType, run_schedule
from lfm.parallel.transfers import Transfers
from tests.parallel.engine_numbers import join
from tests.parallel.test_certificate import SMALL, problem

MICRO_BATCHES = 6


def test_what_is_put_between_two_runs_is_kept_or_made_together_and_in_order():
    made: list[int] = []
    later = LaterProducts()
    for batch in ((1, 2), (3,), (4, 5)):
        for number in batch:
            later.put(lambda number=number: made.append(number))
        later.run(keep=2)
    assert made == [1, 2] and len(later) == 2
    later.run(keep=2)
    assert made == [1, 2]
    later.run(keep=1)
    assert made == [1, 2, 3]
    later.put(lambda: made.append(6))
    later.run()
    assert made == [1, 2, 3, 4, 5, 6] and len(later) == 0


def test_what_waits_builds_no_graph():
    later, x, found = LaterProducts(), torch.ones(2, requires_grad=True), []
    later.put(lambda: found.append(x * 2))
    later.run()
    assert not found[0].requires_grad


def test_a_step_that_did_not_end_leaves_nothing_behind():
    later, made = LaterProducts(), []
    later.put(lambda: made.append(1))
    later.run(keep=1)
    later.put(lambda: made.append(2))
    later.clear()
    later.run()
    assert made == [] and len(later) == 0


class Product(torch.autograd.Function):
    """`x weight^T`, as products with a gradient sum are: the weight's gradient goes there, and none to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors

        def product(total: Tensor, add: bool) -> None:
            gradient = grad.flatten(0, 1).T @ x.flatten(0, 1)
            total.add_(gradient) if add else total.copy_(gradient)

        sum_of_weight = gradient_sum(weight)
        assert sum_of_weight is not None
        sum_of_weight.put(product)
        return grad @ weight, None


def weight_of(chunk: int) -> Tensor:
    generator = torch.Generator().manual_seed(chunk)
    return torch.randn(SMALL.hidden_size, SMALL.hidden_size, generator=generator) / SMALL.hidden_size**0.5


def embedded(ids: Tensor) -> Tensor:
    return torch.sin(ids.T[..., None] * torch.arange(1, SMALL.hidden_size + 1))  # [T, B, D]


class Chunk(nn.Module):
    """One product and a curve; the last chunk's loss is the mean square."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, number: int, last: int, config: Any, virtual_stage: int | None) -> None:
        super().__init__()
        self.number, self.is_last, self.config, self.vp_stage = number, number == last, config, virtual_stage
        self.weight = nn.Parameter(weight_of(number))
        self.received: Tensor | None = None
        self.backward_passes = 0

    def set_input_tensor(self, tensor: Any) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, rows: Any) -> Tensor:
        x = embedded(rows.ids) if self.number == 0 else self.received
        assert x is not None
        x.requires_grad_().register_hook(self._count)
        y = torch.tanh(Product.apply(x, self.weight))
        return y.square().mean() if self.is_last else y

    def _count(self, gradient: Tensor) -> None:
        self.backward_passes += 1


def pipeline_gradients(process: Any, layout: Layout) -> dict[int, tuple[list[list[float]], list[int]]]:
    """By chunk: its gradient, and how many gradients of its input were there when each micro-batch's was made."""
    groups = join(process, layout)
    config = transformer_config(SMALL, layout, torch.float32)
    transfers = Transfers(groups, config)
    stages, rank, made = layout.pipeline, groups.pipeline.rank(), {}
    last, interleaved = layout.pipeline * layout.virtual_pipeline - 1, layout.virtual_pipeline > 1
    chunks = [
        Chunk(v * stages + rank, last, config, v if interleaved else None) for v in range(layout.virtual_pipeline)
    ]
    for chunk in chunks:
        made[chunk.number] = []

        def after(chunk: Chunk = chunk) -> None:
            made[chunk.number].append(chunk.backward_passes)

        total = torch.full_like(chunk.weight, float("nan"))
        chunk.weight.gradient_sum = GradientSum(total, after=after)  # type: ignore[attr-defined]
    transfers.delay(chunk.weight for chunk in chunks)
    rows = problem().batch(0).to(torch.device("cpu"))
    rows = [rows.slice(i, i + 1) for i in range(layout.num_micro_batches)]
    run_schedule(chunks, rows, transfers=transfers, seq_length=SMALL.seq_length, forward_only=False)
    return {c.number: (c.weight.gradient_sum.total.tolist(), made[c.number]) for c in chunks}  # type: ignore[union-attr]


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (2, 2), (2, 3)])
def test_gradients_that_wait_are_those_of_one_process(stages, chunks, micro_batches):
    parallel = ParallelConfig(pipeline=stages, virtual_pipeline=chunks, zero_stage=1)
    layout = check_layout(SMALL, parallel, stages, global_batch_size=micro_batches, micro_batch_size=1)
    found = {
        k: v for rank in run_ranks(pipeline_gradients, stages, layout, timeout_seconds=60) for k, v in rank.items()
    }

    weights = [weight_of(chunk).requires_grad_() for chunk in range(stages * chunks)]
    for row in range(micro_batches):
        x = embedded(problem().batch(0).to(torch.device("cpu")).slice(row, row + 1).ids)
        for weight in weights:
            x = torch.tanh(x @ weight.T)
        (x.square().mean() / micro_batches).backward()
    waited = 0
    for chunk, weight in enumerate(weights):
        gradient, made_after = found[chunk]
        assert weight.grad is not None
        torch.testing.assert_close(torch.tensor(gradient), weight.grad, rtol=1e-5, atol=1e-8)
        assert len(made_after) == micro_batches, "every micro-batch once, before the schedule ends"
        lags = [passes - i - 1 for i, passes in enumerate(made_after)]
        assert 0 <= min(lags) and max(lags) <= layout.waiting_passes
        waited += max(lags)
    assert bool(waited) == (chunks == 1)
