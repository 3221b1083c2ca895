"""Kinds of optimizers, their keys, and the groups of parameters."""

from pathlib import Path

import pytest
import torch

from lfm.checkpoint.manifest import read_manifest
from lfm.data.batch import Batch
from lfm.errors import UserError
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.groups import parameter_groups, split_groups
from lfm.training.optimizer.lion import LionConfig
from lfm.training.plan import memory_estimate
from lfm.training.run import RunConfig
from tests.models.test_lfm import small_config
from tests.training.test_plan import planned
from tests.training.tiny_run import assert_same_checkpoint, rewrite_manifest, tiny_run

ROOT = Path(__file__).parent.parent.parent
PRESET = ROOT / "configs/lfm_debug.yaml"


def test_lion_is_the_papers_program_1():
    config = LionConfig(lr=1e-3, weight_decay=0.5, clip_grad=0)
    engine = LocalEngine(
        small_config(initialization="published", balance={"kind": "bias"}),
        config,
        seed=7,
        device=torch.device("cpu"),
        dtype=torch.float64,
        micro_batch_size=4,
    )
    expected = {name: master.detach().clone() for name, master in engine.masters.items()}
    moments = {name: torch.zeros_like(master) for name, master in expected.items()}
    for step in range(3):
        rows = torch.randint(0, 40, (4, 20), generator=torch.Generator().manual_seed(step))
        engine.forward_backward(Batch(rows, [[20]] * 4))
        for name, theta in expected.items():
            gradient, moment = engine.masters[name].grad.clone(), moments[name]
            decay = 0.5 if theta.dim() > 1 else 0.0
            theta -= 1e-3 * (1 + step) * ((0.9 * moment + 0.1 * gradient).sign() + decay * theta)
            moment.mul_(0.99).add_(gradient, alpha=0.01)
        engine.step(1e-3 * (1 + step))
    for name, master in engine.masters.items():
        assert torch.allclose(master, expected[name], rtol=0, atol=1e-14), name
        assert torch.allclose(engine.optimizer.state[master]["exp_avg"], moments[name], rtol=1e-12, atol=1e-16), name
    assert engine.optimizer_step == 3 and {key.partition(".")[0] for key in engine.tensors()} == set(engine.state_kinds)


def _numbers(lr, scale, *, refused=False, device="cpu"):
    wide = {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in (("lr", lr), ("scale", scale))}
    return {**wide, "refused": torch.tensor(refused, device=device)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_refused_update_leaves_everything_as_it_is(device):
    config, parameter = AdamWConfig(), torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = config.build(parameter_groups(config, [("weight", parameter)]))
    optimizer.state[parameter] = config.new_state(parameter)
    working = {parameter: torch.zeros(3, dtype=torch.bfloat16, device=device)}
    for refused in (False, True):
        before = [tensor.clone() for tensor in (parameter.detach(), *optimizer.state[parameter].values())]
        parameter.grad = torch.tensor([1.0, torch.nan if refused else 2.0, 3.0], device=device)
        config.update(optimizer, **_numbers(1e-2, 1.0, refused=refused, device=device), working=working)
        after = [parameter.detach(), *optimizer.state[parameter].values()]
        assert all(torch.equal(a, b) == refused for a, b in zip(before, after, strict=True))
        assert torch.equal(working[parameter], parameter.bfloat16())


@pytest.mark.parametrize("kind", [AdamWConfig, LionConfig])
def test_the_first_gradient_is_told_from_the_state(kind):
    config, gradient = kind(), torch.tensor([-3.0, 0.0, 0.25])
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = gradient.clone()
    optimizer = config.build(parameter_groups(config, [("weight", parameter)]))
    optimizer.state[parameter] = config.new_state(parameter)
    config.update(optimizer, **_numbers(1e-3, 0.5), working={})
    torch.testing.assert_close(config.first_gradient(optimizer.state[parameter]), 0.5 * gradient)


@pytest.mark.gpu
def test_an_update_on_a_gpu_is_that_of_torch():
    """One pass for clipping, update and working copy, next to torch's update of the same gradients."""
    config = AdamWConfig(lr=1e-2, weight_decay=0.3)
    shapes = {"a": (300, 70), "b": (9,), "c": (1, 5000)}
    start = {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}
    ours, theirs = ({n: torch.nn.Parameter(t.clone()) for n, t in start.items()} for _ in range(2))
    working = {p: torch.empty_like(p, dtype=torch.bfloat16) for n, p in ours.items() if n != "b"}
    optimizers = []
    for parameters in (ours, theirs):
        optimizers.append(config.build(parameter_groups(config, parameters.items())))
        optimizers[-1].state.update({p: config.new_state(p) for p in parameters.values()})
    for _ in range(3):
        for name, shape in shapes.items():
            ours[name].grad = torch.randn(shape, device="cuda")
            theirs[name].grad = 0.25 * ours[name].grad
        config.update(optimizers[0], **_numbers(1e-2, 0.25, device="cuda"), working=working)
        optimizers[1].step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            got, want = (o.state[p][key] for o, p in zip(optimizers, (parameter, theirs[name]), strict=True))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # a rounding of numbers below 1
    assert all(torch.equal(copy, parameter.bfloat16()) for parameter, copy in working.items())


def test_a_resumed_run_of_lion_is_the_uninterrupted_one(tmp_path, text_data):
    keys = ("optimizer.kind=lion", "optimizer.lr=1e-4", "training.steps=4")
    whole = tiny_run(tmp_path / "whole", text_data, *keys)
    train(whole)
    half = whole.folder / "checkpoints/step_00000002"
    resumed = tiny_run(tmp_path / "resumed", text_data, *keys, f"checkpoint.resume={half}")
    train(resumed)
    last = "checkpoints/step_00000004"
    assert_same_checkpoint(resumed.folder / last, whole.folder / last)

    other = tiny_run(tmp_path / "other", text_data, "training.steps=4", f"checkpoint.resume={half}")
    with pytest.raises(UserError) as refused:
        train(other)
    assert str(refused.value) == (
        f"checkpoint {half} has the state of optimizer.kind=lion and the config says adamw; set it alike, or start a "
        f"new run from its weights (name=NAME checkpoint.init_from={half})"
    )
    train(tiny_run(tmp_path / "other", text_data, "training.steps=1", f"checkpoint.init_from={half}"))


def test_a_checkpoint_whose_config_names_no_optimizer_is_adamws(tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "training.steps=2")
    train(run)
    path = run.folder / "checkpoints/step_00000002"
    config = read_manifest(path)["config"]
    assert config.pop("optimizer")["kind"] == "adamw"
    rewrite_manifest(path, config=config)
    train(run)
    with pytest.raises(UserError, match=r"has the state of optimizer\.kind=adamw and the config says lion"):
        train(tiny_run(tmp_path, text_data, "training.steps=2", "optimizer.kind=lion"))


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], AdamWConfig(lr=1e-3, lr_at_width=1024)),
        (
            ["optimizer.kind=lion", "optimizer.betas=[0.95, 0.98]"],
            LionConfig(lr=1e-3, lr_at_width=1024, betas=(0.95, 0.98)),
        ),
    ],
)
def test_the_kind_is_adamw_where_none_is_named(overrides, found):
    run = RunConfig.load(PRESET, [*overrides, "optimizer.lr=1e-3"])
    assert run.optimizer == found
    assert RunConfig.from_tree(run.model_dump(mode="json"), source="itself") == run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.kind=sgd", r"optimizer.kind = 'sgd' in .* is not one of 'adamw', 'lion'"),
        ("optimizer.kind=[1]", r"optimizer.kind = "),
        ("optimizer=3", r"optimizer = 3 in .* is not legal: it takes key: value pairs"),
        ("optimizer={kind: lion, eps: 1}", r"unknown key optimizer.eps \(value 1\)"),
        ("optimizer.lrr=1", r"unknown key optimizer.lrr .*; did you mean optimizer.lr\?"),
        ("optimizer.betas=[0.9, 1.5]", r"optimizer.betas.* = 1.5 in .* is not legal"),
    ],
)
def test_a_wrong_optimizer_is_one_sentence(override, words):
    with pytest.raises(UserError, match=words):
        RunConfig.load(PRESET, [override])


def test_lion_plans_for_half_of_adamws_state():
    run, layout = planned("optimizer.kind=lion", world=1)
    counts, memory = run.model.count_parameters(), memory_estimate(run, layout)
    assert memory["Lion moment"] == 4 * (counts.trainable + counts.padding)


def test_groups_are_in_the_same_order_whatever_comes_first():
    config = AdamWConfig.model_validate({"weight_decay": 0.1, "groups": [{"match": "*b", "lr_multiple": 0.5}]})
    named = {name: torch.zeros((2,) * (2 if "w" in name else 1)) for name in ("w", "v", "wb", "vb", "we", "wide")}
    orders = [
        [
            (sorted(group.named), group.weight_decay, group.lr_multiple, group.is_expert, group.is_wide)
            for group in parameter_groups(config, pairs, experts={"we"}, wide={"wide"})
        ]
        for pairs in (list(named.items()), list(named.items())[::-1])
    ]
    assert (
        orders[0]
        == orders[1]
        == [
            (["wb"], 0.1, 0.5, False, False),
            (["w"], 0.1, 1.0, False, False),
            (["vb"], 0.0, 0.5, False, False),
            (["v"], 0.0, 1.0, False, False),
            (["wide"], 0.1, 1.0, False, True),
            (["we"], 0.1, 1.0, True, False),
        ]
    )


def test_a_split_group_keeps_its_rates_and_every_parameter():
    named = {name: torch.zeros(2, 2) for name in ("a.x", "b.x", "a.y")}
    (group,) = parameter_groups(AdamWConfig(weight_decay=0.2), named.items())
    parts = split_groups([group], lambda name: name[0])
    assert [sorted(part.named) for part in parts] == [["a.x", "a.y"], ["b.x"]]
    assert {(part.weight_decay, part.lr_multiple) for part in parts} == {(0.2, 1.0)}
