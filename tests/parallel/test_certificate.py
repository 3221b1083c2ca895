"""The certificate on a small model: layouts that must pass, silent mistakes that it must name."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from benchmarks.model.certified import small_layout, small_run
from lfm.errors import UserError
from lfm.job.process import require_packages
from lfm.layers.attention import AttentionConfig
from lfm.layers.liquid import ReservoirConfig
from lfm.layers.moe import MoEConfig
from lfm.layers.router import BiasBalance
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import check_layout
from lfm.models.lfm import LFMConfig
from lfm.training.certificate import LAYOUTS, Numbers, Problem, certify, compare, in_one_process
from lfm.training.certificate_faults import FAULTS
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.parallel_engine import ParallelEngine

ROOT = Path(__file__).parents[2]
SMALL = LFMConfig(
    hidden_size=32,
    num_layers=8,
    seq_length=64,
    vocab_size=100,
    vocab_size_multiple=64,
    attention=AttentionConfig(num_attention_heads=4, num_query_groups=2),
    ffn=MoEConfig(num_moe_experts=4, moe_ffn_hidden_size=32),
    liquid=ReservoirConfig(interval=3, num_reservoirs=3, reservoir_size=16),
)


# Weights larger than for training, so that logits are far enough apart for their means to move the bias; and capacity.
LARGE = SMALL.model_copy(update={"init_method_std": 0.3})
BALANCES = {
    "bias": LARGE.model_copy(update={"ffn": SMALL.ffn.model_copy(update={"balance": BiasBalance()})}),
    "step": LARGE.model_copy(
        update={
            "ffn": MoEConfig(
                num_moe_experts=4,
                moe_ffn_hidden_size=32,
                moe_capacity_factor=1.0,
                balance=BiasBalance(mean_decay=None, coeff=0.1, scope="step"),
            )
        }
    ),
}


def problem(recompute="none", model=SMALL, dtype=torch.float32, micro_batch_size=1) -> Problem:
    optimizer = AdamWConfig(lr=1e-2, clip_grad=0.5)
    how = {"micro_batch_size": micro_batch_size, "steps": 2, "recompute": recompute, "dtype": dtype}
    return Problem(model, optimizer, seed=5, rows=8, **how)


@pytest.fixture(scope="module")
def expected() -> Numbers:
    return in_one_process(problem(), "cpu")


@pytest.fixture(scope="module")
def expected_in_bf16() -> Numbers:
    return in_one_process(problem(dtype=torch.bfloat16), "cpu")


def finding(name: str, expected: Numbers, fault=None, model=SMALL, dtype=torch.float32, micro_batch_size=1):
    world, parallel, recompute = LAYOUTS[name]
    layout = check_layout(model, parallel, world, global_batch_size=8, micro_batch_size=micro_batch_size)
    engine_type = FAULTS[fault] if fault else ParallelEngine
    asked = problem(recompute, model, dtype, micro_batch_size)
    return certify(layout, asked, expected, device_type="cpu", engine_type=engine_type)


@functools.cache
def expected_of_balance(name: str) -> Numbers:
    return in_one_process(problem(model=BALANCES[name]), "cpu")


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(
    "name",
    [
        *("dp2_z1", "tp2_ep2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2_interleaved", "dp2_z3_recompute", "dp2_z2")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2_pp2_recompute", "ep2_world4")),
    ],
)
def test_a_layout_balances_routers_as_one_process_does(name, balance):
    expected = expected_of_balance(balance)
    found = finding(name, expected, model=BALANCES[balance])
    assert found.beyond == []
    moved = {name.rpartition(".")[2] for name, tensor in expected.moving.items() if tensor.std() > 1e-3}
    assert moved == ({"drift", "mean"} if balance == "bias" else {"drift", "shares"})


@pytest.mark.parametrize("balance", BALANCES)
def test_a_process_that_balances_by_its_own_rows_alone_is_found(balance):
    found = finding("dp2_z1", expected_of_balance(balance), "balance_of_own_rows", BALANCES[balance])
    assert len(found.beyond) == 1 and found.beyond[0].startswith("balance deviates by")
    assert "layers." in found.beyond[0]


@pytest.mark.parametrize(
    "name",
    [
        *("tp2_pp2", "pp2_vp2_uneven", "tp2_ep2", "dp2_z2", "dp2_z3"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp4_uneven", "ep2_world4", "pp2_ep2_recompute")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dp2_z2_offload", "pp2_interleaved")),
        pytest.param("pp4_interleaved", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2_ep4", "tp2_dp2_z3", "tp2_dp2_z2", "pp2_dp2")),
    ],
)
def test_a_layout_computes_what_one_process_computes(name, expected):
    found = finding(name, expected)
    assert found.beyond == []
    assert len(found.drift) == 2


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [("tp2", 4), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("tp2_pp2", "tp2_ep2", "tp2_dp2_z2"))],
)
def test_a_layout_that_cuts_several_rows_computes_what_one_process_computes(name, micro_batch_size, expected):
    assert finding(name, expected, micro_batch_size=micro_batch_size).beyond == []


@pytest.mark.parametrize(
    "name",
    [
        *("dp2_z1", "tp2_ep2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2_interleaved", "ep2_world4", "tp2_pp2")),
    ],
)
def test_a_layout_in_bf16_computes_what_one_process_computes_to_its_rounding(name, expected_in_bf16):
    assert finding(name, expected_in_bf16, dtype=torch.bfloat16).beyond == []


FAULTY = (
    ("expert_as_dense", "ep2_world4", ".moe."),
    ("unreduced_replicated_weight", "tp2", "norm.weight"),
    ("doubled_expert_gradient", "tp2_ep2", ".experts."),
)


@pytest.mark.parametrize(("fault", "name", "culprit"), FAULTY)
def test_a_silent_mistake_is_found_and_named(fault, name, culprit, expected):
    found = finding(name, expected, fault)
    gradient = next(sentence for sentence in found.beyond if sentence.startswith("gradient"))
    assert culprit in gradient


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name", "culprit"), FAULTY)
def test_a_silent_mistake_is_found_in_bf16_too(fault, name, culprit, expected_in_bf16):
    found = finding(name, expected_in_bf16, fault, dtype=torch.bfloat16)
    gradient = next(sentence for sentence in found.beyond if sentence.startswith("gradient"))
    assert culprit in gradient


def test_a_mistake_in_small_gradients_does_not_hide_behind_large_ones(expected):
    """The doubled experts are a small part of the norm, and a whole part of their own tensors."""
    found = finding("ep2", expected, "doubled_expert_gradient")
    assert found.deviations["gradient"] > 0.5 > found.deviations["norm"]


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match=r"need megatron-core.*pip install 'lfm-training\[parallel\]'"):
        require_packages()


def certify_command(*words: str, kind: str = "lfm") -> subprocess.CompletedProcess:
    config = str(ROOT / f"configs/{kind}_debug.yaml")
    command = [sys.executable, str(ROOT / "launch/certify.py"), "--config", config, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


CERTIFY = (
    *("certify", "--config", ROOT / "configs/lfm_debug.yaml"),
    *("model.hidden_size=32", "model.ffn.moe_ffn_hidden_size=32", "model.seq_length=64", "model.vocab_size=128"),
    *("model.num_layers=4", "model.vocab_size_multiple=128"),
)


def test_the_command_writes_its_numbers(tmp_path, lfm):
    out = tmp_path / "numbers.json"
    found = lfm(*CERTIFY, "--layouts", "dp2_z1,ep2", "--steps", "1", "--json", out)
    assert found.returncode == 0, found.stderr
    assert [row["beyond"] for row in json.loads(out.read_text())["layouts"]] == [[], []]
    assert "layouts_bfloat16" not in json.loads(out.read_text())


def test_the_command_fails_where_a_number_is_out_of_bounds(lfm):
    found = lfm(*CERTIFY, "--layouts", "ep2", "--steps", "1", "--plant", "doubled_expert_gradient")
    assert found.returncode == 1
    assert "out of bounds: DP2 EP2" in found.stderr and ".experts." in found.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layouts", "tp3"], "--layouts tp3 is not one of dp2_z1, tp2"),
        (["--plant", "bug"], "--plant bug is not one of expert_as_dense"),
        (["--steps", "0"], "--steps 0 is not from 1 to 1000"),
        (["training.dtype=bfloat16"], "training.dtype=bfloat16 differs from --dtype float32"),
        (["--dtype", "float8"], "--dtype float8 is not one of float32, bfloat16"),
        (["model.attention.num_query_groups=1", "--layouts", "tp2"], "parallel.tensor=2"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(words, said, lfm):
    found = lfm("certify", "--config", ROOT / "configs/lfm_debug.yaml", *words)
    assert found.returncode == 2
    assert found.stderr.count("error:") == 1 and said in found.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 6, 8, 12])
def test_any_number_of_processes_can_be_certified(world):
    layout = small_layout(small_run("lfm"), ParallelConfig(zero_stage=1), world, torch.float32)
    assert layout.data == world and layout.num_micro_batches * world >= 8


def test_a_layout_that_the_small_model_does_not_fit_is_one_sentence():
    parallel = ParallelConfig(zero_stage=1, tensor=8, sequence_parallel=True)
    with pytest.raises(UserError, match=r"the small model that certifies the layout, lfm_debug, does not fit it: "):
        small_layout(small_run("lfm"), parallel, 8, torch.float32)


@pytest.mark.slow
def test_another_family_is_certified_under_what_it_has_with_dropout():
    small = ["model.hidden_size=16", "model.reservoir_size=32", "model.seq_length=32", "model.vocab_size=128"]
    found = certify_command("--steps", "1", "model.hidden_dropout=0.4", *small, kind="liquidlm")
    assert found.returncode == 0, found.stderr
    assert [line.split(":")[0] for line in found.stdout.splitlines() if line.startswith("ok")] == [
        *("ok     DP2 Z1", "ok     DP2 Z2", "ok     DP2 Z3", "ok     DP2 Z2+offload", "ok     DP2 Z3+offload"),
    ]


STEP = {"loss": 2.0, "cross_entropy": 1.5, "balance_loss": 1.0, "z_loss": 0.5, "norm": 3.0, "clip": 1 / 3}
MOVING = {"c.drift": np.ones(4, np.float32), "c.mean": np.ones(4, np.float32)}
ALL_ONE = Numbers(held_out=1.25, steps=[STEP], gradients={"a": np.ones(4), "b": np.ones(4)}, moving=MOVING)


def rank(**changes):
    """Both ranks hold `a` whole and a slice each of `b`: (squared difference, squared norm, is a slice)."""
    return {
        "held_out": changes.get("held_out", 1.25),
        "steps": [{key: changes.get(key, value) for key, value in STEP.items()}],
        "gradients": {"a": (changes.get("a", 0.0), 4.0, False), "b": (changes.get("b", 0.0), 2.0, True)},
        "moving": {name: tensor * np.float32(changes.get(name, 1)) for name, tensor in MOVING.items()},
    }


def test_equal_numbers_are_certified():
    assert compare("layout", ALL_ONE, [rank(), rank()]).beyond == []


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("name", ["held_out", *STEP, "a", "b", *MOVING])
@pytest.mark.parametrize("value", [math.nan, 1.1], ids=["nan", "wrong"])
def test_one_wrong_number_on_any_rank_is_found(name, bad_rank, value):
    ranks = [rank(), rank()]
    ranks[bad_rank] = rank(**{name: value})
    assert len(compare("layout", ALL_ONE, ranks).beyond) == 1


@pytest.mark.parametrize(("name", "is_beyond"), [("c.mean", False), ("c.drift", True)])
def test_means_may_be_a_step_of_their_grid_away_and_what_is_counted_may_not(name, is_beyond):
    found = compare("layout", ALL_ONE, [rank(), rank(**{name: 1 + 2**-8})])
    assert bool(found.beyond) == is_beyond and found.deviations["balance"] == 2**-8


def test_a_balance_that_no_rank_has_is_found():
    expected = dataclasses.replace(ALL_ONE, moving={**MOVING, "d.mean": np.ones(4)})
    assert "d.mean" in compare("layout", expected, [rank(), rank()]).beyond[0]


def test_a_gradient_that_no_rank_has_is_found():
    expected = dataclasses.replace(ALL_ONE, gradients={**ALL_ONE.gradients, "c": np.ones(4)})
    assert compare("layout", expected, [rank(), rank()]).beyond
