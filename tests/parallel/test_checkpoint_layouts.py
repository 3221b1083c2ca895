"""One checkpoint wanders through layouts, a step in each: the run is the one that a single process makes."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

import torch

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import load_tensors
from lfm.evaluation.held_out import score
from lfm.inference.load import load_model
from lfm.job.fork import run_ranks
from lfm.layers.attention import AttentionConfig
from lfm.layers.liquid import ReservoirConfig
from lfm.layers.moe import MoEConfig
from lfm.layers.router import BiasBalance
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import check_layout
from lfm.models.lfm import LFMConfig
from lfm.training.certificate import LAYOUTS, Problem
from lfm.training.engine import Engine
from lfm.training.local_engine import LocalEngine
from lfm.training.optimizer.adamw import AdamWConfig
from tests.training.tiny_run import manifest_fields

SMALL = LFMConfig(
    hidden_size=32,
    num_layers=8,
    seq_length=32,
    vocab_size=100,
    vocab_size_multiple=64,
    attention=AttentionConfig(num_attention_heads=4, num_query_groups=2),
    ffn=MoEConfig(num_moe_experts=4, moe_ffn_hidden_size=32, balance=BiasBalance(coeff=0.1, scope="step")),
    liquid=ReservoirConfig(interval=3, num_reservoirs=3, reservoir_size=16),
)
PROBLEM = Problem(SMALL, AdamWConfig(lr=3e-3, clip_grad=0.5), seed=3, rows=8, micro_batch_size=1, steps=1)

LOCAL = "one process, local engine"
SHORT_CHAIN = (LOCAL, "tp2_pp2", "dp2_z3", "ep2_world4", "pp2_interleaved", LOCAL)
CHAIN = (
    *(LOCAL, "tp2_pp2", "dp2_z3", "ep2_world4", "pp2_interleaved", "tp2_dp2_z2", "pp4_uneven", "tp2_ep2", LOCAL),
    *("dp2_z2_offload", "tp2_ep4", "dp2_z1", "pp2_ep2", "tp2_dp2_z3", "tp2", "ep2_z2", "pp2", LOCAL),
)


def one_step(engine: Engine, folder, step: int, ranks: tuple[int, int], group=None) -> tuple[float, float]:
    """Load step `step`, if there is one, make the next, save it; (loss, gradient norm)."""
    if step:
        path = checkpoint.find(folder)
        manifest = read_manifest(path)
        checkpoint.verify(path, manifest, rank=ranks[0], world_size=ranks[1])
        engine.load_state_tensors(lambda targets: load_tensors(path, manifest, targets))
        engine.load_state_values(manifest["counters"])
    result = engine.forward_backward(PROBLEM.batch(step)[engine.rows_of_step(PROBLEM.rows)])
    norm = engine.step(PROBLEM.optimizer.lr)
    with Saver(folder / "checkpoints", keep=100, asynchronous=True, group=group) as saver:
        manifest = manifest_fields(step + 1, counters=engine.state_values(), model=SMALL.model_dump(mode="json"))
        saver.save(step + 1, engine.state_tensors(), manifest, b"{}", owned=engine.state_tensors_are_fresh)
    return result.loss, norm


def step_on_rank(process, parallel: ParallelConfig, folder, step: int, dtype: torch.dtype) -> tuple[float, float]:
    from lfm.parallel import groups as process_groups
    from lfm.training.parallel_engine import ParallelEngine

    device = torch.device("cpu")
    layout = check_layout(
        SMALL, parallel, process.world_size, global_batch_size=PROBLEM.rows, micro_batch_size=PROBLEM.micro_batch_size
    )
    process_groups.join(process, device, timeout_seconds=60)
    engine = ParallelEngine(
        SMALL,
        PROBLEM.optimizer,
        process_groups.make_groups(layout, device),
        seed=PROBLEM.seed + (step > 0),  # after the first step everything must come from the checkpoint
        dtype=dtype,
        micro_batch_size=PROBLEM.micro_batch_size,
    )
    found = one_step(engine, folder, step, (process.rank, process.world_size), process_groups.gloo_group(60))
    process_groups.leave()
    return found


def local_engine(seed: int, dtype: torch.dtype) -> LocalEngine:
    options = {"device": torch.device("cpu"), "dtype": dtype, "micro_batch_size": PROBLEM.micro_batch_size}
    return LocalEngine(SMALL, PROBLEM.optimizer, seed=seed, **options)


def local_step_on_rank(process, folder, step: int, dtype: torch.dtype) -> tuple[float, float]:
    return one_step(local_engine(PROBLEM.seed + (step > 0), dtype), folder, step, (0, 1))


def wander(folder, chain, dtype: torch.dtype) -> list[tuple[float, float]]:
    found = []
    for step, name in enumerate(chain):
        if name == LOCAL:
            found += run_ranks(local_step_on_rank, 1, folder, step, dtype, timeout_seconds=120)
        else:
            world, parallel, _ = LAYOUTS[name]
            ranks = run_ranks(step_on_rank, world, parallel, folder, step, dtype, timeout_seconds=120)
            assert len(set(ranks)) == 1, f"{name}: the ranks differ in {ranks}"
            found += ranks[:1]
    return found


def the_same_steps_in_one_process(process, folder, steps: int) -> list[tuple[float, float, str, float]]:
    """Each step again, by the local engine from the checkpoint that the step began with.

    (loss, norm, key of the state that differs most from the checkpoint after it, its relative deviation).
    """
    found = []
    for step in range(steps):
        engine = local_engine(PROBLEM.seed, torch.float32)
        if step:
            path = folder / "checkpoints" / f"step_{step:08d}"
            manifest = read_manifest(path)
            engine.load_state_tensors(
                lambda targets, path=path, manifest=manifest: load_tensors(path, manifest, targets)
            )
            engine.load_state_values(manifest["counters"])
        result = engine.forward_backward(PROBLEM.batch(step))
        norm = engine.step(PROBLEM.optimizer.lr)
        after = folder / "checkpoints" / f"step_{step + 1:08d}"
        stored = {key: torch.empty_like(tensor) for key, tensor in engine.tensors().items()}
        load_tensors(after, read_manifest(after), stored)
        deviations = {
            key: float((stored[key] - tensor).norm() / tensor.norm().clamp(min=1e-12))
            for key, tensor in engine.tensors().items()
        }
        worst = max(deviations, key=lambda key: deviations[key])
        found.append((result.loss, norm, worst, deviations[worst]))
    return found


@pytest.mark.parametrize("chain", [SHORT_CHAIN, pytest.param(CHAIN, marks=pytest.mark.slow)], ids=["short", "long"])
def test_a_run_that_changes_its_layout_at_every_step_is_the_same_run(chain, tmp_path):
    """Weights, moments, step count, warm-ups and what balances routers move through ordered pairs of layouts and ZeRO
    stages, in fp32.

    The long chain has 17 pairs.  Step by step, because rounding alone grows over many: what each layout loads, computes
    and saves is what one process makes of the same checkpoint.
    """
    found = wander(tmp_path, chain, torch.float32)
    again = run_ranks(the_same_steps_in_one_process, 1, tmp_path, len(chain), timeout_seconds=200)[0]
    for name, (loss, norm), (expected_loss, expected_norm, worst, deviation) in zip(chain, found, again, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6), name
        assert norm == pytest.approx(expected_norm, rel=1e-5), name
        assert deviation < 1e-3, f"{name}: {worst}"
    model, _, _ = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    nats, labels = score(model, PROBLEM.batch(0))
    assert nats / labels < found[0][0]  # what launch/generate.py loads has learned the first batch


def uninterrupted(process, steps: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    engine, found = local_engine(PROBLEM.seed, dtype), []
    for step in range(steps):
        result = engine.forward_backward(PROBLEM.batch(step))
        found.append((result.loss, engine.step(PROBLEM.optimizer.lr)))
    return found


@pytest.mark.slow
def test_a_bf16_run_moves_between_layouts_to_its_rounding(tmp_path):
    """Masters and moments are fp32 and move whole; bf16 sums differ by layout, so losses agree to three digits."""
    chain = ("tp2_pp2", "ep2", "dp2_z3", "pp2", "dp2_z2", LOCAL)
    expected = run_ranks(uninterrupted, 1, len(chain), torch.bfloat16, timeout_seconds=120)[0]
    found = wander(tmp_path, chain, torch.bfloat16)
    for name, (loss, _), (expected_loss, _) in zip(chain, found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=3e-3), name
