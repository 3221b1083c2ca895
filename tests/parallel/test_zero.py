"""DeepSpeed over a module of our own: what the engine of a model family cannot show alone."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.job.fork import run_ranks
from lfm.job.process import Process
from lfm.layout.layout import Layout
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.groups import parameter_groups
from tests.parallel.engine_numbers import join

STEPS, LR = 3, 1e-3


class Scaled(nn.Module):
    """A linear layer in bf16 whose outputs are scaled by a wide parameter, near 1, where bf16 knows steps of 2^-7."""

    wide_parameters = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.linspace(0.9, 1.1, 5))
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 30).view(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        # The wide gradient is that of cos(scale) and of x alone: what bf16 does to the linear layer is not in it.
        return self.linear(x).sum() + (self.scale.cos() * x.float().sum(0)[:5]).sum()


def _rows(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()


def _zero(process: Process, layout: Layout) -> dict[str, Any]:
    from lfm.parallel.zero import Weight, fragments, make_engine

    module, config = Scaled(), AdamWConfig(lr=LR, clip_grad=0)
    weights = [
        Weight(n, p, is_expert=False, is_cut=False, is_copy=False, is_wide=n == "scale")
        for n, p in module.named_parameters()
    ]
    groups = parameter_groups(config, module.named_parameters(), wide={"scale"})
    engine = make_engine(
        module,
        weights,
        join(process, layout),
        build=lambda: config.build(groups),
        update=config.update,
        new_state=config.new_state,
        clip_grad=0.0,
        micro_batch_size=4,
    )
    for step in range(STEPS):
        if layout.zero_stage == 1:
            engine.optimizer.start_gradients(leaves_early=True, micro_batches=1)
            (module(_rows(step, process.rank)) / layout.data).backward()
            engine.optimizer.finish_gradients()
            engine.optimizer.step(lr=LR)
            engine.optimizer.wait_for_weights()
        else:
            engine(_rows(step, process.rank)).backward()
            engine.step()
    kept = fragments(engine, weights)["scale"]
    return {
        "dtypes": {name: p.dtype for name, p in module.named_parameters()},
        "scale": module.scale.tolist(),
        "master": (kept.start, kept.view(kept.flat).tolist()) if kept is not None else (0, []),
    }


@functools.cache
def _expected() -> list[float]:
    """AdamW in fp32 over the mean gradient of the ranks."""
    scale = Scaled().scale
    optimizer = torch.optim.AdamW([scale], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(STEPS):
        summed = sum(_rows(step, rank).float().sum(0)[:5] for rank in range(2))
        scale.grad = -scale.detach().sin() * summed / 2
        optimizer.step()
    return scale.tolist()


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_wide_parameter_is_updated_in_fp32_among_bf16_ones(zero_stage):
    one = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "num_micro_batches", "balance")
    layout = Layout(
        **dict.fromkeys(one, 1),
        world=2,
        data=2,
        expert_data=2,
        sequence_parallel=False,
        zero_stage=zero_stage,
        offload_optimizer=False,
        chunk_layers=((0,),),
    )
    ranks = run_ranks(_zero, 2, layout, timeout_seconds=60)
    for found in ranks:
        assert found["dtypes"] == {"linear.weight": torch.bfloat16, "scale": torch.float32}
        assert found["scale"] == pytest.approx(_expected(), rel=2e-7)
        start, values = found["master"]
        assert found["scale"][start : start + len(values)] == values
    assert sum(len(found["master"][1]) for found in ranks) == 5
