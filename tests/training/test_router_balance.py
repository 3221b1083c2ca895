"""Routers are balanced between steps by the whole batch: what moves, what does not, and what is said and kept of it."""

import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lfm.checkpoint.manifest import read_manifest
from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.inference.load import load_model
from lfm.layers.router import Balance, BiasBalance, LossBalance
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.router_balance import RouterBalance, uneven_above
from tests.comparison import assert_close
from tests.models.test_lfm import small_config
from tests.training.tiny_run import assert_same_checkpoint, checkpoint_tensors, losses, rewrite_manifest, tiny_run

BIAS = {"kind": "bias"}
LENGTHS = [[20], [3, 17], [1] * 20, [9, 11]]
BIASED = ("model.ffn.balance.kind=bias", "model.ffn.balance.coeff=0.1", "model.ffn.balance.scope=step")


def engine_of(balance, *, micro_batch_size=4, recompute="none", **changes) -> LocalEngine:
    return LocalEngine(
        small_config(balance=balance, initialization="published", init_method_std=0.4, **changes),
        AdamWConfig(lr=1e-2),
        seed=7,
        device=torch.device("cpu"),
        dtype=torch.float64,
        micro_batch_size=micro_batch_size,
        recompute=recompute,
    )


def batch(step=0) -> Batch:
    return Batch(torch.randint(0, 40, (4, 20), generator=torch.Generator().manual_seed(step)), LENGTHS)


def moving(engine) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in engine.state_tensors().items() if key.startswith("moving.")}


def guard_of(config, num_layers=1, **options) -> RouterBalance:
    """Of a model whose layers are on this process."""
    model = small_config(num_layers=num_layers, balance=config.model_dump())
    return RouterBalance(model, {layer: Balance(4, config) for layer in range(num_layers)}, **options)


def step(guard, *loads, update=1, logits=None) -> None:
    measured = {"expert_load": dict(enumerate(loads))}
    guard.after_backward(measured | ({"router_logits": dict(enumerate(logits))} if logits else {}))
    guard.after_update(update, None)


def test_drift_moves_by_the_sign_and_mean_follows_the_logits():
    guard = guard_of(BiasBalance(update_rate=0.25, mean_decay=0.5))
    balance = guard.balances[0]
    # 20 choices are of 10 tokens; in units of 2^-10, 10 tokens whose mean logits are 1, -2, 0.3 and 0.
    step(guard, [10, 5, 5, 0], logits=[[10240, -20480, 3072, 0]])
    assert balance.drift.tolist() == [-0.25, 0, 0, 0.25]
    assert balance.mean.tolist() == [0.5, -1, round(0.15 * 256) / 256, 0]
    step(guard, [10, 5, 5, 0], logits=[[10240, -20480, 3072, 0]])
    assert balance.drift.tolist() == [-0.5, 0, 0, 0.5]
    assert balance.mean.tolist() == [0.75, -1.5, round((0.15 + round(0.15 * 256) / 512) * 256) / 256, 0]


def test_shares_are_those_of_the_step_before():
    guard = guard_of(LossBalance(scope="step"), num_layers=2)
    step(guard, [10, 5, 5, 0], [5, 5, 5, 5])
    assert [balance.shares.tolist() for balance in guard.balances.values()] == [[0.5, 0.25, 0.25, 0], [0.25] * 4]


def test_a_step_moves_the_bias_by_its_whole_batch_whatever_the_micro_batches():
    whole, split = engine_of(BIAS), engine_of(BIAS, micro_batch_size=1)
    for each in range(3):
        results = [engine.forward_backward(batch(each)) for engine in (whole, split)]
        assert results[0].measured["expert_load"] == results[1].measured["expert_load"]
        assert "router_logits" not in results[0].measured
        before = moving(whole)
        for engine in (whole, split):
            engine.step(1e-2)
        after = moving(whole)
        assert all(torch.equal(after[name], tensor) for name, tensor in moving(split).items())
        assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_sees_the_same_bias(recompute):
    found = []
    for how in ("none", recompute):
        engine = engine_of(BIAS | {"coeff": 0.1, "scope": "step"}, recompute=how)
        for each in range(2):
            engine.forward_backward(batch(each))
            grads = {name: master.grad.clone() for name, master in engine.masters.items()}
            engine.step(1e-2)
        found.append(grads | moving(engine))
    assert_close(found[1], found[0], 1e-12)


def test_a_refused_step_moves_and_counts_nothing():
    engine = engine_of(BIAS | {"scope": "step"})
    engine.forward_backward(batch())
    engine.step(1e-2)
    before, counters = moving(engine), engine.guards[-1].state()
    engine.model.final_norm.weight.register_hook(lambda grad: grad * torch.inf)
    engine.forward_backward(batch(1))
    with pytest.raises(NonFiniteError):
        engine.step(1e-2)
    assert len(before) == 9 and all(torch.equal(tensor, before[key]) for key, tensor in moving(engine).items())
    assert engine.guards[-1].state() == counters


def test_evaluation_and_streaming_see_the_bias_that_training_moved():
    engine = engine_of(BIAS | {"update_rate": 0.5})
    model, ids = engine.model, batch().ids[:1]
    start = model.eval()(ids)[0]
    for _ in range(4):
        engine.forward_backward(batch())
        engine.step(0.0)
    whole, _ = model.eval()(ids)
    assert not torch.allclose(whole, start, atol=1e-3)
    first, state = model(ids[:, :7])
    rest, _ = model(ids[:, 7:], state)
    assert torch.allclose(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-12)
    assert torch.allclose(model.train()(ids)[0], whole, rtol=0, atol=1e-12)


def test_what_is_handed_to_a_saver_does_not_move():
    engine = engine_of(BIAS)
    handed = moving(engine)
    engine.forward_backward(batch())
    engine.step(1e-2)
    assert all((tensor == 0).all() for tensor in handed.values())
    assert any((tensor != 0).any() for tensor in moving(engine).values())


def test_loads_even_out_under_the_bias_alone():
    """The same rows at every step, and no learning: what changes is the choice."""
    engine, found = engine_of(BIAS | {"update_rate": 0.1}), []
    for balance in engine.balances.values():
        balance.drift[0] = 3
    for _ in range(60):
        result = engine.forward_backward(batch())
        engine.step(0.0)
        found.append(max(max(load) * 4 / sum(load) for load in result.measured["expert_load"].values()))
    assert found[0] > 1.9 and max(found[-5:]) < 1.3


def test_an_expert_is_dead_after_a_hundred_steps_and_alive_with_a_token():
    guard = guard_of(LossBalance())
    for _ in range(99):
        step(guard, [10, 5, 5, 0])
    assert guard.record() == {"dead_experts": {"0": 0}}
    step(guard, [20, 0, 0, 0])
    assert guard.record() == {"dead_experts": {"0": 1}}
    step(guard, [10, 5, 4, 1])
    assert guard.record() == {"dead_experts": {"0": 0}}


UNEVEN, EVEN = [60, 20, 10, 10], [30, 30, 20, 20]


def test_an_uneven_layer_is_said_once_until_it_has_been_even(capsys):
    guard = guard_of(LossBalance(), num_layers=2)
    for update in range(1, 302):
        step(guard, EVEN, EVEN if update == 150 else UNEVEN, update=update)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "update 100: for 100 steps one expert of layer 1 has had more than 1.5 times the mean" in lines[0]
    assert "(now 2.40); set model.ffn.balance.kind=bias, or raise model.ffn.balance.coeff (now 0.01)" in lines[0]
    assert "update 250:" in lines[1]


def test_a_run_that_was_interrupted_says_it_when_the_other_does(capsys):
    guard, rest = guard_of(BiasBalance()), guard_of(BiasBalance())
    for update in range(1, 61):
        step(guard, UNEVEN, update=update, logits=[[0] * 4])
    rest.load(guard.state())
    for update in range(61, 120):
        step(rest, UNEVEN, update=update, logits=[[0] * 4])
    (line,) = capsys.readouterr().err.splitlines()
    assert "update 100:" in line and line.endswith("raise model.ffn.balance.update_rate (now 0.02)")
    assert rest.state()["router_uneven_steps"] == {"0": 119}


def test_one_process_speaks_of_the_layers_it_holds(capsys):
    silent, elsewhere = guard_of(LossBalance(), speaks=False), guard_of(LossBalance())
    elsewhere.balances = {}
    for _ in range(120):
        step(silent, UNEVEN)
        step(elsewhere, UNEVEN)
    assert capsys.readouterr().err == ""
    assert silent.state() == elsewhere.state()


@pytest.mark.parametrize("experts, top_k, above", [(8, 2, 2.0), (64, 6, 2.0), (4, 2, 1.5), (8, 4, 1.5), (2, 2, 1.0)])
def test_a_collapse_counts_as_uneven_whatever_the_number_of_experts(experts, top_k, above):
    assert uneven_above(experts, top_k) == above
    assert above < experts / top_k or experts == top_k, "all tokens on the same top_k experts"


@pytest.mark.parametrize("balance", [BIAS, {"kind": "loss", "scope": "step"}, {"kind": "loss"}], ids=str)
def test_one_expert_trains(balance):
    engine = engine_of(balance, num_moe_experts=1, moe_router_topk=1)
    result = engine.forward_backward(batch(0))
    assert {len(load) for load in result.measured["expert_load"].values()} == {1}
    engine.step(1e-3)
    assert engine.record()["dead_experts"]["0"] == 0


def test_a_checkpoint_that_lacks_a_bias_of_its_own_balance_is_damaged(uninterrupted, tmp_path, text_data):
    shutil.copytree(uninterrupted.folder, tmp_path / uninterrupted.folder.name)
    run = tiny_run(tmp_path, text_data, "checkpoint.keep=9", "training.steps=8", *BIASED)
    path = run.folder / "checkpoints/step_00000006"
    tensors, _ = checkpoint_tensors(path)
    del tensors["moving.layers.0.moe.balance.drift"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP announces that no process group is in use
        dcp.save(tensors, checkpoint_id=path, no_dist=True)
    rewrite_manifest(path)
    with pytest.raises(UserError, match=r"lacks moving\.layers\.0\.moe\.balance\.drift"):
        train(run)


@pytest.mark.parametrize("counters", [{"0": [0, 0, 0, 0]}, {"0": [0, 0], "1": [0, 0, 0, 0]}, {}], ids=str)
def test_router_counters_of_another_model_are_refused(counters, uninterrupted, tmp_path, text_data):
    shutil.copytree(uninterrupted.folder, tmp_path / uninterrupted.folder.name)
    run = tiny_run(tmp_path, text_data, "checkpoint.keep=9", "training.steps=8", *BIASED)
    path = run.folder / "checkpoints/step_00000006"
    found = read_manifest(path)["counters"]
    found |= {"router_idle_steps": counters, "router_uneven_steps": dict.fromkeys(counters, 0)}
    rewrite_manifest(path, counters=found)
    with pytest.raises(
        UserError, match="has router counters that are not of its model, which has 2 layers of 4 experts"
    ):
        train(run)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text_data):
    run = tiny_run(tmp_path_factory.mktemp("whole"), text_data, "checkpoint.keep=9", *BIASED)
    train(run)
    return run


def test_an_interrupted_run_is_the_uninterrupted_one(uninterrupted, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "checkpoint.keep=9", *BIASED)
    checkpoints = run.folder / "checkpoints"
    train(run)
    for lost in ("step_00000004", "step_00000006"):
        shutil.rmtree(checkpoints / lost)
    train(run)
    assert_same_checkpoint(checkpoints / "step_00000006", uninterrupted.folder / "checkpoints/step_00000006")
    assert losses(run.folder) == losses(uninterrupted.folder)


def test_a_checkpoint_holds_what_moves_and_no_hash_of_it(uninterrupted):
    path = uninterrupted.folder / "checkpoints/step_00000006"
    tensors, manifest = checkpoint_tensors(path)
    found = {key for key in tensors if key.startswith("moving.")}
    assert found == {f"moving.layers.{i}.moe.balance.{name}" for i in (0, 1) for name in ("drift", "mean", "shares")}
    assert all(key.startswith("frozen.") for key in manifest["frozen"])
    assert all((tensors[key] != 0).any() for key in found)
    assert read_manifest(path)["counters"]["router_idle_steps"].keys() == {"0", "1"}


def test_generation_routes_as_training_did(uninterrupted):
    path = uninterrupted.folder / "checkpoints/step_00000006"
    tensors, _ = checkpoint_tensors(path)
    model, _, _ = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    for layer, balance in model.balances.items():
        prefix = f"moving.layers.{layer}.moe.balance."
        assert torch.equal(balance.bias(), tensors[prefix + "drift"] - tensors[prefix + "mean"])
        assert torch.equal(balance.shares, tensors[prefix + "shares"])


def test_records_show_what_routers_are_watched_by(uninterrupted):
    (*_, last) = [r for r in read_metrics(uninterrupted.folder / "metrics.jsonl") if "cross_entropy" in r]
    assert (
        last["router_entropy"].keys() == last["router_input_cosine"].keys() == last["dead_experts"].keys() == {"0", "1"}
    )
    assert all(0 < value < 1.4 for value in last["router_entropy"].values())
    assert all(-1 <= value <= 1 for value in last["router_input_cosine"].values())
    assert "router_logits" not in last


def last_tensors(run) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(sorted((run.folder / "checkpoints").iterdir())[-1])[0]


def test_another_kind_of_balance_starts_afresh_and_says_so(tmp_path, text_data, capsys):
    loss = "model.ffn.balance.kind=loss"
    train(tiny_run(tmp_path, text_data, "training.steps=2", loss))
    capsys.readouterr()
    biased = tiny_run(tmp_path, text_data, "training.steps=4", *BIASED)
    train(biased)
    said = [line for line in capsys.readouterr().out.splitlines() if "starts afresh" in line]
    assert len(said) == 1 and "step_00000002 has no moving.layers.0.moe.balance.drift (and 5 more)" in said[0]
    drift = last_tensors(biased)["moving.layers.0.moe.balance.drift"]
    assert drift.abs().max() <= 2 * 0.02 + 1e-6 and (drift != 0).any()

    # And back: what the new kind lacks is left unread.
    train(back := tiny_run(tmp_path, text_data, "training.steps=6", loss))
    said = capsys.readouterr().out
    assert "afresh" not in said and said.count("model.ffn.balance.kind=bias keeps it") == 1
    assert not any(key.startswith("moving.") for key in last_tensors(back))

    # Nor is a part of a bias left out without a word.
    capsys.readouterr()
    train(tiny_run(tmp_path, text_data, "training.steps=8", *BIASED))
    train(tiny_run(tmp_path, text_data, "training.steps=10", *BIASED, "model.ffn.balance.mean_decay=null"))
    assert capsys.readouterr().out.count("without the mean logits of") == 1


def test_a_run_from_the_weights_of_another_takes_its_bias(uninterrupted, tmp_path, text_data):
    slow = ("training.steps=1", *BIASED, "model.ffn.balance.update_rate=0.001")
    run = tiny_run(tmp_path, text_data, *slow, f"checkpoint.init_from={uninterrupted.folder}")
    train(run)
    start, after = last_tensors(uninterrupted), last_tensors(run)
    for key in ("moving.layers.0.moe.balance.drift", "moving.layers.1.moe.balance.drift"):
        assert start[key].abs().max() > 0.019
        assert torch.allclose(after[key], start[key], rtol=0, atol=0.0011) and not torch.equal(after[key], start[key])
