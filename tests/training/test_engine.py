import math
import warnings

import pytest
import torch

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.models.global_names import global_views
from lfm.models.initialization import materialize
from lfm.models.liquidlm import LiquidLMConfig
from lfm.models.liquidnet import LiquidNetConfig
from lfm.models.registry import build
from lfm.training.draws import seed_of_draws
from lfm.training.local_engine import LocalEngine
from lfm.training.optimizer.adamw import AdamWConfig
from tests.comparison import assert_close
from tests.models import test_laerc
from tests.models.test_lfm import small_config
from tests.nested import nested

LENGTHS = [[20], [3, 17], [1] * 20, [9, 11]]


def _engine(micro_batch_size=4, dtype=torch.float64, recompute="none", **changes) -> LocalEngine:
    return LocalEngine(
        small_config(**({"initialization": "published"} | changes)),
        AdamWConfig(lr=1e-2),
        seed=7,
        device=torch.device("cpu"),
        dtype=dtype,
        micro_batch_size=micro_batch_size,
        recompute=recompute,
    )


def _rows():
    return torch.randint(0, 40, (4, 20), generator=torch.Generator().manual_seed(1))


def _grads(engine):
    grads = {n: m.grad for n, m in engine.masters.items()}
    return {n: g.clone() for n, g in global_views(engine.model, lambda n, _: grads.get(n)).items()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_change_neither_losses_nor_gradients(micro_batch_size):
    # The rows have 19, 18, 0 and 18 labels: averaging micro-batch means would be wrong.
    whole, split = _engine(), _engine(micro_batch_size)
    a, b = whole.forward_backward(Batch(_rows(), LENGTHS)), split.forward_backward(Batch(_rows(), LENGTHS))
    assert a.counts == b.counts and a.counts.labels == 55
    assert a.loss == pytest.approx(b.loss, rel=1e-12) and a.terms == pytest.approx(b.terms, rel=1e-12)
    assert a.terms.keys() == {"cross_entropy", "balance_loss", "z_loss"}
    assert a.measured["expert_load"] == b.measured["expert_load"]
    assert_close(_grads(split), _grads(whole), 1e-10)
    assert split.step(1e-2) == pytest.approx(whole.step(1e-2), rel=1e-12)


def test_bf16_weights_follow_fp32_masters_with_fp32_accumulation():
    engine = _engine(micro_batch_size=1, dtype=torch.bfloat16)
    start = {n: m.clone() for n, m in engine.masters.items()}
    engine.forward_backward(Batch(_rows(), LENGTHS))
    assert all(m.dtype == m.grad.dtype == torch.float32 for m in engine.masters.values())
    assert all(p.grad is None for p in engine.model.parameters()), "a micro-batch's gradient was kept"
    engine.step(1e-6)  # far below bf16's resolution: only masters can move
    assert all((engine.masters[n] != start[n]).any() for n in start if "norm" not in n)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, engine.masters[name].bfloat16())
    state = engine.optimizer.state[engine.masters["embedding.weight"]]
    assert state["exp_avg"].dtype == torch.float32


def _bf16_liquidnet() -> LocalEngine:
    config = LiquidNetConfig(**nested(hidden_size=64, num_layers=1, ffn_hidden_size=16, seq_length=20, vocab_size=40))
    options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "micro_batch_size": 2}
    return LocalEngine(config, AdamWConfig(lr=1e-2), seed=7, **options)


def test_half_lives_of_a_bf16_model_start_right_to_five_digits():
    engine = _bf16_liquidnet()
    bias = engine.model.layers["0"].liquid.delta_bias
    assert bias.dtype == torch.float32 and engine.model.embedding.weight.dtype == torch.bfloat16
    delta = bias.detach().double().exp().log1p() + engine.config.delta_min
    want = torch.logspace(0, 12, 64, base=2, dtype=torch.float64)
    assert ((math.log(2) / delta) / want - 1).abs().max() < 1e-5


def test_an_fp32_parameter_of_a_bf16_model_is_its_own_master():
    engine = _bf16_liquidnet()
    bias, name = engine.model.layers["0"].liquid.delta_bias, "layers.0.liquid.delta_bias"
    assert engine.masters[name] is bias
    # The output projection starts at zero: nothing reaches the bias until it has moved.
    for _ in range(2):
        before = bias.detach().clone()
        engine.forward_backward(Batch(_rows(), LENGTHS))
        assert bias.grad.dtype == torch.float32 and bias.grad.isfinite().all()
        engine.step(1e-2)
    assert (bias != before).all()


def test_frozen_reservoirs_are_bit_identical_after_training():
    engine = _engine()
    before = {n: t.clone() for n, t in engine.tensors().items() if n.startswith("frozen.")}
    assert len(before) == 4
    for _ in range(3):
        engine.forward_backward(Batch(_rows(), LENGTHS))
        engine.step(1e-2)
    after = engine.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("reservoirs" in name for name in engine.masters)


def test_trained_reservoirs_move_and_keep_their_zeros():
    engine = _engine(liquid={"train_reservoir": True})
    before = engine.masters["layers.0.liquid.reservoirs"].detach().clone()
    for _ in range(3):
        engine.forward_backward(Batch(_rows(), LENGTHS))
        engine.step(1e-2)
    after = engine.masters["layers.0.liquid.reservoirs"]
    assert torch.equal(after == 0, before == 0) and (after[before != 0] != before[before != 0]).all()


def _after_update(number, **liquid):
    """Masters of a layer's reservoirs and what was warned of, after the update of that number, of next to no size."""
    engine = _engine(liquid={"train_reservoir": True, "spectral_radius": 3.0, **liquid})
    engine.forward_backward(Batch(_rows(), LENGTHS))
    engine.optimizer_step = number - 1
    before = engine.masters["layers.0.liquid.reservoirs"].detach().clone()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine.step(1e-12)
    after = engine.masters["layers.0.liquid.reservoirs"].detach()
    return before, after, [str(warning.message) for warning in warned]


def test_trained_reservoirs_that_no_longer_forget_are_scaled_every_hundred_updates():
    before, after, warned = _after_update(100, backend="chunked")
    ratio = float(after.norm() / before.norm())
    assert ratio < 0.9 and torch.allclose(after, before * ratio, atol=1e-9)
    assert any("update 100: reservoirs of layer 0 came to forget too slowly" in text for text in warned)


@pytest.mark.parametrize(
    "number, liquid",
    [(99, {"backend": "chunked"}), (100, {"backend": "sequential"}), (100, {}), (100, {"spectral_radius": 0.9})],
    ids=["not yet", "sequential", "too short to be cut", "forgets"],
)
def test_other_trained_reservoirs_are_left_alone(number, liquid):
    before, after, warned = _after_update(number, **liquid)
    assert torch.allclose(after, before, atol=1e-9) and not any("forget" in text for text in warned)


def test_frozen_reservoirs_of_another_family_train_in_chunks():
    config = test_laerc.small_model(torch.float32, backend="chunked", chunk_length=8, warmup=32).config
    engine = LocalEngine(
        config, AdamWConfig(lr=1e-2), seed=7, device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=4
    )
    assert engine.liquids
    before = engine.masters["embedding.weight"].detach().clone()
    engine.forward_backward(Batch(_rows() % config.vocab_size, LENGTHS))
    engine.step(1e-2)
    assert (engine.masters["embedding.weight"] != before).any()


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_the_update_is_clipped_adamw(dtype, bound):
    engine = _engine(dtype=dtype)
    engine.forward_backward(Batch(_rows(), LENGTHS))
    masters = {n: m.detach().clone() for n, m in engine.masters.items()}
    grads = {n: m.grad.clone() for n, m in engine.masters.items()}
    norm = float(torch.sqrt(sum(g.double().square().sum() for g in grads.values())))
    assert norm > 1.5 and engine.step(3e-3) == pytest.approx(norm, rel=1e-9)
    for name, start in masters.items():
        g = grads[name] / (norm + 1e-6)  # DeepSpeed's epsilon
        decay = 0.1 if start.dim() > 1 else 0.0
        want = start * (1 - 3e-3 * decay) - 3e-3 * g / (g.abs() + 1e-8)  # first step: m / sqrt(v) is g / |g|
        assert torch.allclose(engine.masters[name], want, rtol=0, atol=bound), name
        state = engine.optimizer.state[engine.masters[name]]
        assert torch.allclose(state["exp_avg"], 0.1 * g, rtol=bound, atol=bound * 1e-2), name
        assert torch.allclose(state["exp_avg_sq"], 0.05 * g.square(), rtol=bound, atol=bound * 1e-2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_steps_gradients_begin_anew(dtype):
    engine = _engine(micro_batch_size=2, dtype=dtype)
    engine.forward_backward(Batch(_rows(), LENGTHS))
    first = _grads(engine)
    engine.forward_backward(Batch(_rows(), LENGTHS))
    second = _grads(engine)
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_backward_pass_that_did_not_end_leaves_nothing_to_the_next_step(dtype):
    """Small gradients, which wait for each other, were made before the exception and are of no later step."""

    def broken(gradient):
        raise ZeroDivisionError

    engine, other = (_engine(micro_batch_size=2, dtype=dtype) for _ in range(2))
    hook = dict(engine.model.named_parameters())["layers.0.attention_norm.weight"].register_hook(broken)
    with pytest.raises(ZeroDivisionError):
        engine.forward_backward(Batch(_rows(), LENGTHS))
    hook.remove()
    for each in (engine, other):
        each.forward_backward(Batch(_rows(), LENGTHS))
    want = _grads(other)
    assert all(torch.equal(gradient, want[name]) for name, gradient in _grads(engine).items())


def test_a_non_finite_loss_names_its_rows_and_stops_before_the_update():
    engine = _engine(micro_batch_size=2, untie_embeddings_and_output_weights=True)
    start = {n: m.detach().clone() for n, m in engine.masters.items()}
    with torch.no_grad():
        engine.model.embedding.weight[39] = torch.nan
        start["embedding.weight"][39] = torch.nan
    rows = _rows() % 39
    engine.forward_backward(Batch(rows, LENGTHS))
    rows[3, 4] = 39
    with pytest.raises(NonFiniteError, match=r"rows 2 to 3 of the batch"):
        engine.forward_backward(Batch(rows, LENGTHS))
    assert all(torch.equal(m.nan_to_num(), start[n].nan_to_num()) for n, m in engine.masters.items())


def test_a_non_finite_gradient_stops_before_the_update():
    engine = _engine()
    start = {n: m.detach().clone() for n, m in engine.masters.items()}
    engine.model.final_norm.weight.register_hook(lambda grad: grad * torch.inf)
    engine.forward_backward(Batch(_rows(), LENGTHS))
    with pytest.raises(NonFiniteError, match=r"final_norm\.weight"):
        engine.step(1e-2)
    assert all(torch.equal(m, start[n]) for n, m in engine.masters.items())


def test_ids_that_may_be_no_label_are_given_and_not_asked_for():
    engine, mask = _engine(), torch.rand(_rows().shape, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = Batch(_rows(), LENGTHS, mask)
    result = engine.forward_backward(batch)
    engine.model.eval()
    with torch.no_grad():
        logits, _ = engine.model(batch.ids, doc_lengths=LENGTHS)
    labels = batch.to("cpu").documents.labels(batch.ids)
    asked = Batch(_rows(), LENGTHS).to("cpu").documents.labels(batch.ids)[:, :-1][mask[:, 1:]]
    assert result.counts.labels == (labels >= 0).sum() == (asked >= 0).sum() < 55
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert result.terms["cross_entropy"] == pytest.approx(float(want), rel=1e-12)
    nats, count = engine.evaluate(batch)
    assert nats / count == pytest.approx(float(want), rel=1e-12)


def test_evaluation_does_not_drop_tokens():
    engine, dropless, batch = _engine(moe_capacity_factor=0.5), _engine(), Batch(_rows(), LENGTHS)
    assert engine.evaluate(batch) == pytest.approx(dropless.evaluate(batch), rel=1e-12)
    dropped, kept = engine.forward_backward(batch), dropless.forward_backward(batch)
    assert dropped.loss != pytest.approx(kept.loss, rel=1e-6)
    # The load is of the choices, before any is dropped: those of the first layer are alike.
    assert dropped.measured["expert_load"][0] == kept.measured["expert_load"][0]
    assert all(sum(load) == 2 * 80 for load in dropped.measured["expert_load"].values())


def test_warmup_rises_when_the_residual_does():
    liquid = {"backend": "chunked", "chunk_length": 4, "warmup": 32, "leak_rate": 0.02, "tolerance": 0.5}
    engine = _engine(liquid=liquid)
    rows = torch.randint(0, 40, (2, 64))
    result = engine.forward_backward(Batch(rows, [[64], [64]]))
    assert result.measured["reservoir_residual"][0] > 2e-3
    assert engine.state_values()["reservoir_warmup"]["0"] == 64


def test_no_gradient_is_a_zero_gradient():
    engine = _engine(dtype=torch.float32)
    master = engine.masters["layers.0.attention.out.weight"]
    for step in range(2):
        master.requires_grad_(step == 0)
        engine.forward_backward(Batch(_rows(), LENGTHS))
        assert (master.grad == 0).all() == (step == 1)
        before = master.detach().clone()
        engine.step(1e-2)
    assert (master != before).any(), "neither decay nor momentum moved it"
    assert {int(state["step"]) for state in engine.optimizer.state.values()} == {2}


def test_a_group_has_its_own_rate_and_decay():
    """With the moments at zero AdamW's first step is lr x sign(gradient), after decay by lr x weight_decay."""
    groups = [
        {"match": "embedding.weight", "lr_multiple": 0.25, "weight_decay": 0.0},
        {"match": "layers.0.*norm.weight", "lr_multiple": 2.0, "weight_decay": 0.5},
        {"match": "*", "lr_multiple": 0.0},
    ]
    config = AdamWConfig.model_validate({"lr": 1e-2, "eps": 1e-20, "groups": groups, "clip_grad": 0})
    engine = LocalEngine(
        small_config(), config, seed=7, device=torch.device("cpu"), dtype=torch.float64, micro_batch_size=4
    )
    before = {name: master.clone() for name, master in engine.masters.items()}
    engine.forward_backward(Batch(_rows(), LENGTHS))
    signs = {name: master.grad.sign() for name, master in engine.masters.items()}
    engine.step(1e-3)
    moved = {name: master - before[name] for name, master in engine.masters.items()}
    for name, step in moved.items():
        seen = signs[name] != 0
        if name == "embedding.weight":
            expected = -0.25e-3 * signs[name]
        elif name.startswith("layers.0.") and name.endswith("norm.weight"):
            expected = -2e-3 * signs[name] - 2e-3 * 0.5 * before[name]
        else:
            expected = torch.zeros_like(step)
        assert torch.allclose(step[seen], expected[seen], rtol=1e-3, atol=1e-7), name


def test_a_group_that_matches_nothing_is_refused():
    config = AdamWConfig.model_validate({"groups": [{"match": "*.no_such"}]})
    with pytest.raises(UserError, match=r"match=\*\.no_such is the name of no parameter"):
        LocalEngine(small_config(), config, seed=7, device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=4)


def test_a_model_beyond_the_machine_is_refused_before_it_is_allocated():
    config = LiquidNetConfig(hidden_size=1 << 17, num_layers=4, vocab_size=1 << 20)
    with pytest.raises(UserError, match=r"the weights of model.kind=liquidnet take [0-9,.]+ GiB and this cpu has"):
        materialize(lambda: build(config), device=torch.device("cpu"), dtype=torch.float32)


def test_random_draws_are_of_the_seed_the_step_and_the_row_alone():
    def engine(seed):
        config = LiquidLMConfig(hidden_size=8, reservoir_size=16, vocab_size=40, seq_length=20, hidden_dropout=0.4)
        return LocalEngine(
            config,
            AdamWConfig(lr=1e-2),
            seed=seed,
            device=torch.device("cpu"),
            dtype=torch.float32,
            micro_batch_size=1,
        )

    def loss(engine, step, rows=slice(0, 4)):
        engine.start_step(step, 9)
        return engine.forward_backward(Batch(_rows()[rows], LENGTHS[rows])).loss

    first, other = engine(7), engine(7)
    found = [loss(first, step) for step in range(3)]
    torch.rand(3)
    assert [loss(other, step) for step in (2, 0, 1)] == [found[2], found[0], found[1]] and len(set(found)) == 3
    twice = Batch(_rows()[[0, 0]], [LENGTHS[0]] * 2)
    first.start_step(0, 9)
    assert first.forward_backward(twice).loss != loss(first, 0, slice(0, 1))
    drawn = [seed_of_draws(*case) for case in [(7, 2, 0), (7, 2, 1), (7, 1, 2), (8, 2, 0), (72, 0, 0)]]
    assert len(set(drawn)) == 5 and drawn[0] == 8787878719498961675


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_device():
    """What it needs to know came with the losses."""
    engine = LocalEngine(
        small_config(),
        AdamWConfig(lr=1e-2, clip_grad=0.1),
        seed=7,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        micro_batch_size=2,
    )
    start = {name: master.clone() for name, master in engine.masters.items()}
    for mode in ("default", "error"):
        engine.forward_backward(Batch(_rows(), LENGTHS))
        torch.cuda.set_sync_debug_mode(mode)
        try:
            assert engine.step(1e-2) > 0.1
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all((engine.masters[name] != start[name]).any() for name in start)
