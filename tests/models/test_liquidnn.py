import itertools
import weakref
from collections import Counter

import pytest
import torch

from lfm.data.stream import DataConfig, open_split
from lfm.kernels.liquid_cell.reference import drive, end_point
from lfm.kernels.liquid_cell.running_trace import FACTORS
from lfm.layers.documents import Documents, Rows
from lfm.models.initialization import initialize
from lfm.models.liquidnn import (
    LiquidNNConfig,
    MiniLiquidGPT,
    reset_hidden,
    reset_traces,
    trace_norms,
)
from lfm.objectives.next_token import NEXT_TOKEN
from tests.comparison import assert_close, relative_error
from tests.losses import cross_entropy
from tests.models.reference_liquidnn import batch_forward, sequence_loss

SMALL = {
    "hidden_size": 8,
    "num_fast": 1,
    "num_deep": 2,
    "deep_steps": 2,
    "vocab_size": 20,
    "seq_length": 24,
    "max_positions": 6,
    "dropout": 0.0,
    "bptt_window": 5,
}
VARIANTS = {
    "default": {},
    "published": {"trace_grad": False, "positions": "until_max"},
    "euler": {"integrator": "euler", "deep_steps": 3},
    "exponential": {"integrator": "exponential"},
    "adaptive": {"adaptive_steps": True},
    "adaptive_exponential": {"adaptive_steps": True, "integrator": "exponential", "deep_steps": 1},
    "deep_only": {"num_fast": 0, "num_deep": 1},
    "fast_only": {"num_fast": 2, "num_deep": 0},
}
STREAMED = {
    f"{variant}_{name}": VARIANTS[variant] | changes
    for variant in ("default", "published", "adaptive", "exponential")
    for name, changes in {
        "off": {"plastic": False},
        "batch_mean": {"trace_mode": "batch_mean"},
        "batch_mean_off": {"trace_mode": "batch_mean", "plastic": False},
    }.items()
}
"""With plasticity off, and with traces that the rows of a batch share."""


def small_model(dtype=torch.float64, plastic=True, seed=3, **changes) -> MiniLiquidGPT:
    """Larger embeddings and plastic weights than for training, so that every part shows in the logits; some traces
    reach their largest norm and some do not; some time constants are short.
    """
    model = MiniLiquidGPT(LiquidNNConfig.model_validate(SMALL | changes))
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-1]
        if kind in ("bias", "alpha") or "norm" in name:
            parameter.data += (0.5 if kind == "alpha" else 0.1) * torch.randn(parameter.shape, generator=generator)
        if kind == "log_eta":
            parameter.data += 3.0 if ".ih." in name else 0.5
        if name.endswith("tau_output.bias"):
            parameter.data -= 1.0
    model.embedding.weight.data *= 30
    model.plastic = plastic
    return model.to(dtype)


def weights_of(model: MiniLiquidGPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def gradients(tensors) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in tensors}


def random_ids(batch, length, seed=0):
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plastic", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_the_equations(variant, plastic):
    """Windows of 5 tokens: the reference detaches its memory at the same places."""
    model, ids = small_model(plastic=plastic, **VARIANTS[variant]), random_ids(2, 13)
    w = weights_of(model)
    want = sum(sequence_loss(w, model.config, row, plastic=plastic) for row in ids.tolist())
    want.backward()
    documents, got = Documents.whole_rows(2, 13, "cpu"), 0.0
    for losses in model.loss_parts(Rows(ids, documents), NEXT_TOKEN):
        losses.sums["cross_entropy"].backward()
        got += losses.sums["cross_entropy"].detach()
    assert relative_error(got, want) < 1e-12
    assert_close(gradients(model.named_parameters()), gradients(w.items()), 1e-9)


def test_a_window_of_the_whole_row_is_full_backpropagation():
    """Over more tokens than a running trace keeps as outer products."""
    length = FACTORS + 4
    model, ids = small_model(bptt_window=64), random_ids(1, length)
    w = weights_of(model)
    logits, _ = batch_forward(w, model.config, ids.tolist(), plastic=True)
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    parts = list(model.loss_parts(Rows(ids, Documents.whole_rows(1, length, "cpu")), NEXT_TOKEN))
    assert len(parts) == 1
    parts[0].sums["cross_entropy"].backward()
    assert_close(gradients(model.named_parameters()), gradients(w.items()), 1e-9)


@pytest.mark.parametrize("trace_grad", [False, True])
def test_logits_state_and_gradients_of_batch_shared_traces_equal_the_equations(trace_grad):
    model, ids = small_model(trace_mode="batch_mean", trace_grad=trace_grad), random_ids(3, 9)
    w = weights_of(model)
    want, memories = batch_forward(w, model.config, ids.tolist(), plastic=True)
    got, state = model(ids)
    assert relative_error(got, want) < 1e-10
    for b, (hidden, traces) in enumerate(memories):
        found = [*(h[b] for h in state.hidden), *itertools.chain(*((m.ih[b], m.hh[b]) for m in state.traces))]
        for have, expected in zip(found, [*hidden, *itertools.chain(*traces.values())], strict=True):
            assert relative_error(have, expected) < 1e-10
    got.square().sum().backward()
    want.square().sum().backward()
    assert_close(gradients(model.named_parameters()), gradients(w.items()), 1e-9)


def test_the_state_holds_the_traces_of_the_equations_and_some_are_at_their_largest():
    model, ids = small_model(), random_ids(2, FACTORS + 3)
    w = weights_of(model)
    _, memories = batch_forward(w, model.config, ids.tolist(), plastic=True)
    _, state = model(ids)
    ratios = []
    for b, (_, traces) in enumerate(memories):
        for cell, (i, (ih, hh)) in enumerate(traces.items()):
            assert relative_error(state.traces[cell].ih[b], ih) < 1e-9
            assert relative_error(state.traces[cell].hh[b], hh) < 1e-9
            norms = trace_norms(state)[cell]
            for norm, synapse, trace in zip(norms, ("ih", "hh"), (ih, hh), strict=True):
                assert relative_error(norm[b], trace.norm()) < 1e-9
                ratios.append(float((norm[b] / w[f"cells.{i}.{synapse}.weight"].norm()).detach()))
    assert max(ratios) == pytest.approx(0.3, rel=1e-6) and min(ratios) < 0.29


@torch.no_grad()
def test_a_token_never_changes_earlier_logits_through_batch_shared_traces():
    model, ids = small_model(trace_mode="batch_mean"), random_ids(2, 20)
    before = model(ids)[0]
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 20
        after = model(changed)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).any(-1).all()


@torch.no_grad()
def test_sequences_of_a_batch_see_each_other_with_batch_shared_traces_only():
    ids, order = random_ids(4, 12), torch.tensor([2, 0, 3, 1])
    for trace_mode, apart in (("per_sequence", True), ("batch_mean", False)):
        model = small_model(trace_mode=trace_mode, adaptive_steps=True)
        together = model(ids)[0]
        assert torch.allclose(model(ids[order])[0], together[order], atol=1e-12)
        alone = torch.cat([model(row[None])[0] for row in ids])
        assert torch.allclose(alone, together, atol=1e-12) == apart


@torch.no_grad()
def test_windows_change_gradients_alone():
    ids, documents = random_ids(2, 24), Documents.from_lengths([[9, 15], [24]], "cpu")
    losses = [cross_entropy(small_model(bptt_window=n), ids, documents) for n in (1, 5, 23, 100)]
    assert all(relative_error(loss, losses[0]) < 1e-12 for loss in losses)


def peak_saved_bytes(model, length) -> int:
    """Most storage that autograd holds at one time in a step of one row."""
    live, holders, peak = 0, Counter(), 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # the tensor itself could keep alive the node that saves it

    def pack(tensor):
        nonlocal live, peak
        held, storage = Held(tensor), tensor.untyped_storage()
        where = (storage.data_ptr(), storage.nbytes())
        live += 0 if holders[where] else where[1]
        holders[where] += 1
        peak = max(peak, live)
        weakref.finalize(held, release, where)
        return held

    def release(where):
        nonlocal live
        holders[where] -= 1
        live -= 0 if holders[where] else where[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        rows = Rows(random_ids(1, length), Documents.whole_rows(1, length, "cpu"))
        for losses in model.loss_parts(rows, NEXT_TOKEN):
            losses.sums["cross_entropy"].backward()
    return peak


@pytest.mark.parametrize("plastic", [False, True], ids=["off", "on"])
def test_memory_of_training_does_not_grow_with_the_row(plastic):
    model = small_model(plastic=plastic)
    short, long = peak_saved_bytes(model, 16), peak_saved_bytes(model, 41)
    assert 0 < long <= short * 1.01
    assert peak_saved_bytes(small_model(plastic=plastic, bptt_window=64), 41) > 4 * long


def test_a_token_keeps_no_matrix_for_its_traces():
    models = {n: small_model(hidden_size=256, num_fast=0, num_deep=1, bptt_window=n) for n in (4, 8)}
    peaks = {n: peak_saved_bytes(model, n + 1) for n, model in models.items()}
    assert 0 < peaks[8] - peaks[4] < 4 * (256 * 256 * 8)


@pytest.mark.parametrize("plastic, trace_grad", [(False, True), (True, False), (True, True)])
def test_which_plastic_parameters_get_a_gradient(plastic, trace_grad):
    model = small_model(plastic=plastic, trace_grad=trace_grad)
    cross_entropy(model, random_ids(2, 12), Documents.whole_rows(2, 12, "cpu")).backward()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-1]
        fast = name.startswith("cells.0.")
        if kind == "alpha":
            trained = plastic and not fast
        elif kind in ("log_eta", "logit_decay"):
            trained = plastic and trace_grad and not fast
        else:
            trained = True
        has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert has_gradient == trained, name


@torch.no_grad()
def test_plasticity_off_neither_uses_nor_changes_traces():
    model, ids = small_model().eval(), random_ids(1, 8)
    _, state = model(ids)
    model.plastic = False
    off, after = model(ids, state)
    assert torch.equal(off, model(ids, reset_traces(state))[0])
    assert all(torch.equal(a.ih, b.ih) for a, b in zip(state.traces, after.traces, strict=True))
    model.plastic = True
    assert not torch.allclose(off, model(ids, state)[0], atol=1e-6)


@torch.no_grad()
def test_hidden_states_and_traces_are_reset_apart():
    model, ids = small_model().eval(), random_ids(2, 8)
    _, state = model(ids)
    kept = reset_hidden(state)
    assert (kept.position == 0).all() and all((h == 0).all() for h in kept.hidden)
    assert kept.traces is state.traces and all((norm > 0).all() for pair in trace_norms(kept) for norm in pair)
    cleared = reset_traces(state)
    assert all((norm == 0).all() for pair in trace_norms(cleared) for norm in pair)
    assert torch.equal(cleared.position, state.position) and cleared.hidden is state.hidden
    # What was read before shows after the hidden state is gone: through the traces, and only through them.
    assert not torch.allclose(model(ids, kept)[0], model(ids)[0], atol=1e-6)
    assert torch.equal(model(ids, reset_traces(kept))[0], model(ids)[0])


def test_traces_are_state_and_not_weights():
    model = small_model()
    before = set(model.state_dict())
    model(random_ids(2, 5))
    assert set(model.state_dict()) == before == set(dict(model.named_parameters()))
    B, D, L, deep = 2, 8, 3, 2
    assert model.empty_state(B).num_bytes == 8 * B * (1 + L * D + deep * 2 * D * D)


def test_plasticity_starts_after_its_share_of_the_steps_and_is_on_at_inference():
    model = small_model(plastic_from=0.4)
    phases = []
    for step in range(10):
        model.start_step(step, 10)
        phases.append(model.plastic)
    assert phases == [False] * 4 + [True] * 6
    assert MiniLiquidGPT(model.config).plastic
    never = small_model(plastic_from=1.0)
    never.start_step(9, 10)
    assert not never.plastic and not MiniLiquidGPT(never.config).plastic


@torch.no_grad()
def test_evaluation_modes_differ_and_leave_the_phase_alone():
    model, ids, documents = small_model(), random_ids(2, 12), Documents.whole_rows(2, 12, "cpu")
    for phase in (False, True):
        model.plastic, losses = phase, []
        for mode in model.evaluation_modes:
            with model.evaluating(mode):
                losses.append(float(cross_entropy(model, ids, documents)))
        assert model.plastic == phase and model.evaluation_mode == model.evaluation_modes[int(phase)]
        assert losses[int(phase)] == float(cross_entropy(model, ids, documents)) != losses[int(not phase)]
    with pytest.raises(ValueError, match=r"'both' is not one of \['plasticity_off', 'plasticity_on'\]"):
        with model.evaluating("both"):
            pass


@torch.no_grad()
def test_adaptive_steps_are_as_many_as_the_shortest_time_constant_needs():
    cell = small_model(adaptive_steps=True).cells[1]
    tau = torch.tensor([[0.2, 3.0], [0.21, 1.0], [0.4, 9.0], [0.5, 0.5], [0.9, 0.9], [7.0, 5.0], [float("nan"), 1.0]])
    assert cell.integration.chosen_steps(tau)[:, 0].tolist() == [5, 5, 3, 2, 2, 2, 2]
    assert cell.integration.chosen_steps(tau.double())[:, 0].tolist() == [5, 5, 3, 2, 2, 2, 2]


@torch.no_grad()
def test_short_time_constants_need_adaptive_or_exponential_steps():
    """One Euler step of 1 / 0.2: the end point leaves the range of tanh.  The others stay in it."""
    ends = {}
    for name, changes in {"euler": {}, "adaptive": {"adaptive_steps": True}, "exponential": {}}.items():
        integrator = "exponential" if name == "exponential" else "euler"
        cell = small_model(num_fast=1, num_deep=0, integrator=integrator, **changes).cells[0]
        cell.tau_output.bias.fill_(-30.0)
        weights, x = cell.weights(), torch.randn(4, 8, dtype=torch.float64)
        h = 0.9 * torch.ones(4, 8, dtype=torch.float64)
        end = end_point(x, drive(x, weights), h, weights.hidden, weights.tau, weights.tau_bias, cell.integration, None)
        ends[name] = float(end.abs().max())
    assert ends["euler"] > 1.5 and ends["adaptive"] <= 1 and ends["exponential"] <= 1


def test_documents_do_not_follow_a_state():
    model = small_model()
    with pytest.raises(ValueError, match="exclude each other"):
        model.advance(random_ids(2, 3), model.empty_state(2), Documents.whole_rows(2, 3, "cpu"))


@pytest.mark.parametrize(
    "dimensions, total",
    [((256, 2, 2), 14_707_472), ((128, 1, 1), 6_664_072), ((512, 3, 3), 36_761_112)],
    ids=["base", "small", "large"],
)
def test_counts_of_the_published_configurations(dimensions, total):
    D, fast, deep = dimensions
    config = LiquidNNConfig(hidden_size=D, num_fast=fast, num_deep=deep)
    with torch.device("meta"):
        model = MiniLiquidGPT(config)
    counts = config.count_parameters()
    assert counts.total == counts.trainable == total == sum(p.numel() for p in model.parameters())
    assert counts.active == total - sum(
        p.numel()
        for cell in model.cells[:fast]
        for n, p in cell.named_parameters()
        if n.endswith(("alpha", "log_eta", "logit_decay"))
    )
    assert counts.active_non_embedding == counts.active - model.embedding.weight.numel()
    if total == 14_707_472:
        parts = [sum(p.numel() for n, p in model.named_parameters() if n.startswith(k)) for k in ("emb", "cell")]
        norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
        assert (*parts, norms) == (12_865_792, 1_839_120, 2_560)


def test_flops_by_hand():
    config = LiquidNNConfig(plastic_from=0.5)
    fast, deep, plastic = 4 + 6, 4 + 6 * 6, 2 * 7 + 2 * (1 + 6)
    cells = (2 * fast + 2 * (deep + 0.5 * plastic)) * 256 * 256
    assert config.flops_per_token() == 3 * (cells + 2 * 50_257 * 256)


def test_initial_values_have_their_distributions():
    D = 128
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=D, vocab_size=1000))
    initialize(model, 0)
    w = {name: p.detach() for name, p in model.named_parameters()}
    normal = {"embedding.weight": 0.02, "cells.3.ih.weight": 0.5 * D**-0.5, "cells.0.hh.alpha": 0.01}
    for name, std in normal.items():
        assert float(w[name].std()) == pytest.approx(std, rel=0.03) and abs(float(w[name].mean())) < 0.03 * std
    for name, inputs in {"tau_input.weight": 2 * D, "tau_input.bias": 2 * D, "tau_output.bias": D}.items():
        values = w["cells.1." + name]
        assert 0.9 * inputs**-0.5 < float(values.abs().max()) <= inputs**-0.5
        assert float(values.std()) == pytest.approx((inputs * 3) ** -0.5, rel=0.2)
    rule = model.cells[2].ih.rule(mode="per_sequence", differentiable=True)
    assert rule.eta.item() == pytest.approx(0.001458, abs=1e-6) and rule.decay.item() == pytest.approx(0.9526, abs=1e-4)
    assert all((w[f"norms.{i}.weight"] == 1).all() and (w[f"norms.{i}.bias"] == 0).all() for i in range(4))
    assert (w["cells.0.ih.bias"] == 0).all() and (w["final_norm.weight"] == 1).all()


def test_a_fresh_model_predicts_every_token_alike():
    """The published first loss is about ln V."""
    model = MiniLiquidGPT(LiquidNNConfig(hidden_size=64, vocab_size=1000, seq_length=16))
    initialize(model, 0)
    ids = torch.randint(0, 1000, (4, 16))
    loss = cross_entropy(model, ids, Documents.whole_rows(4, 16, "cpu")) / 60
    assert float(loss) == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.1)


def test_dropout_acts_in_training_alone():
    model, ids = small_model(dropout=0.5), random_ids(1, 6)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_a_few_steps_learn_a_text_in_both_phases(text_data):
    rows = open_split(DataConfig(path=str(text_data)), "train", seq_length=64, vocab_size=512)
    taken = rows.read(range(4)).to("cpu")
    config = LiquidNNConfig(hidden_size=32, num_fast=1, num_deep=1, deep_steps=2, seq_length=64, vocab_size=512)
    model = MiniLiquidGPT(config)
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(8):
        model.start_step(step, 8)
        optimizer.zero_grad()
        total = 0.0
        for part in model.loss_parts(taken, NEXT_TOKEN):
            loss = part.sums["cross_entropy"] / taken.documents.num_labels
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    assert losses[3] < losses[0] - 0.3 and losses[7] < losses[4] - 0.2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 7}, "hidden_size=7 is odd.*nearest is 8"),
        ({"num_fast": 0, "num_deep": 0}, "leave no cell"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LiquidNNConfig.model_validate(SMALL | changes)
