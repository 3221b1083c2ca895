"""float16: scaled losses, skipped updates."""

import json
import math
import shutil

import pytest
import torch

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.models.global_names import global_views
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.loss_scale import GROW_AFTER_UPDATES, LossScale
from lfm.training.metrics_file import read_metrics
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.run import RunConfig
from tests.models.test_lfm import small_config
from tests.training.tiny_run import tiny_run

LENGTHS = [[20], [3, 17]]


def engine_of(dtype: torch.dtype, scale: float = 2.0**16) -> LocalEngine:
    return LocalEngine(
        small_config(),
        AdamWConfig(lr=1e-3),
        seed=7,
        device=torch.device("cpu"),
        dtype=dtype,
        micro_batch_size=1,
        initial_loss_scale=scale,
    )


def batch() -> Batch:
    return Batch(torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1)), LENGTHS)


def gradients(engine: LocalEngine) -> dict[str, torch.Tensor]:
    scale = engine.loss_scale.value if engine.loss_scale is not None else 1.0
    engine.forward_backward(batch())
    grads = {name: master.grad for name, master in engine.masters.items()}
    return {n: g.double() / scale for n, g in global_views(engine.model, lambda n, _: grads.get(n)).items()}


def test_scaled_gradients_are_those_of_fp32_and_the_norm_is_without_the_factor():
    wide, engine = engine_of(torch.float32), engine_of(torch.float16)
    want, got = gradients(wide), gradients(engine)
    assert got.keys() == want.keys()
    for name, right in want.items():
        assert float((got[name] - right).norm()) < 1e-2 * float(right.norm()) + 1e-6, name
    assert engine.step(1e-3) == pytest.approx(wide.step(1e-3), rel=1e-2)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, engine.masters[name].half())


def test_an_overflow_skips_the_update_and_halves_the_scale():
    engine = engine_of(torch.float16, 2.0**40)
    start = {name: master.clone() for name, master in engine.masters.items()}
    norms = []
    while not norms or norms[-1] == math.inf:
        assert all(torch.equal(engine.masters[name], start[name]) for name in start)
        assert engine.optimizer_step == 0
        engine.forward_backward(batch())
        norms.append(engine.step(1e-3))
    skipped = len(norms) - 1
    assert 5 < skipped < 40 and math.isfinite(norms[-1])
    assert engine.record()["loss_scale"] == 2.0 ** (40 - skipped)
    assert engine.record()["skipped_updates"] == skipped
    assert engine.optimizer_step == 1
    assert any(not torch.equal(engine.masters[name], start[name]) for name in start)


def test_the_scale_grows_again_and_ends_the_run_where_it_cannot_help():
    scale = LossScale(4.0)
    assert all(scale.after(1.0) for _ in range(GROW_AFTER_UPDATES)) and scale.value == 8
    assert not any(scale.after(math.nan) for _ in range(3)) and scale.value == 1 and scale.skipped_updates == 3
    with pytest.raises(NonFiniteError, match=r"gradient norm is inf at a loss scale of 1: lower optimizer\.lr"):
        scale.after(math.inf)


def test_a_resumed_run_is_the_uninterrupted_one_with_its_scale(tmp_path, text_data):
    keys = ("training.dtype=float16", f"training.initial_loss_scale={2.0**30}", "logging.every_steps=1")
    whole = tiny_run(tmp_path / "whole", text_data, *keys, "training.steps=4")
    train(whole)
    parts = tmp_path / "parts"
    train(tiny_run(parts, text_data, *keys, "training.steps=4", "checkpoint.every_steps=1"))
    # Back to step 2, as after a kill.
    run = tiny_run(parts, text_data, *keys, "training.steps=4")
    for name in ("step_00000003", "step_00000004"):
        shutil.rmtree(run.folder / "checkpoints" / name)
    train(run)
    final = "checkpoints/step_00000004/manifest.json"
    one, other = (json.loads((each.folder / final).read_text())["counters"] for each in (whole, run))
    assert one == other and one["skipped_updates"] >= 1 and one["loss_scale"] == 2.0 ** (30 - one["skipped_updates"])
    losses = [[r["loss"] for r in read_metrics(each.folder / "metrics.jsonl") if "loss" in r] for each in (whole, run)]
    assert losses[0] == losses[1]
    skipped = [r for r in read_metrics(whole.folder / "metrics.jsonl") if "loss" in r and "grad_norm" not in r]
    assert len(skipped) == one["skipped_updates"] and all(r["skipped_updates"] > 0 for r in skipped)


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (["training.dtype=float16", "parallel.zero_stage=1"], "training.dtype=float16 does not go with parallel.zero"),
        (["training.initial_loss_scale=0.5"], "training.initial_loss_scale"),
        (["training.initial_loss_scale=1.5"], "initial_loss_scale=1.5 is no power of two; take one near it, such as 2"),
    ],
)
def test_what_float16_cannot_have_is_refused(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        RunConfig.load("configs/lfm_debug.yaml", keys)
