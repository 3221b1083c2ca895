import os
import subprocess
import sys

import pytest
import torch

from lfm.kernels.backend import disagreement
from lfm.kernels.liquid_cell import CellWeights, Integration, Norm, Synapses, TraceRule, Traces, kernel, liquid_cell, op
from lfm.layers.documents import Documents
from lfm.models.initialization import initialize
from lfm.models.liquidnn import LiquidNNConfig, MiniLiquidGPT
from tests.comparison import assert_close
from tests.losses import cross_entropy

# The CPU interprets the kernels.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, D = 2, 4, 16
EULER, RK2 = Integration("euler", 3), Integration("rk2", 2)
EXPONENTIAL, ONE = Integration("exponential", 2), Integration("rk2", 1)


def draw(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def make_leaves(*, plastic, length=T, width=D):
    """The norms of ih are held at first and then free."""
    leaves = {"x": draw(B, length, width), "state": draw(B, width)}
    leaves |= {"input": draw(2 * width, width, scale=width**-0.5), "hidden": draw(2 * width, width, scale=width**-0.5)}
    leaves |= {"tau": draw(width, width, scale=width**-0.5), "input_bias": draw(2 * width), "tau_bias": 1 + draw(width)}
    leaves |= {"gain": draw(width), "bias": draw(width)}
    if plastic:
        for name, largest in (("ih", 1.2), ("hh", 1.5)):
            leaves |= {f"M_{name}": draw(B, width, width, scale=0.1), f"alpha_{name}": draw(width, width)}
            numbers = {"eta": [0.02], "decay": [0.95], "largest": largest}
            leaves |= {f"{part}_{name}": torch.tensor(value).to(leaves["x"]) for part, value in numbers.items()}
    return leaves


def outputs_and_gradients(
    leaves, integration, backend, *, dtype=torch.float32, keep=None, fresh=None, shared=False, through=True
):
    """`leaves` in `dtype`; a shared trace is that of the first sequence."""
    own = {name: x.detach().to(dtype) for name, x in leaves.items()}
    plastic = "M_ih" in own
    own = {name: x.requires_grad_(through or not name.startswith("M_")) for name, x in own.items()}
    weights = CellWeights(*(own[name] for name in ("input", "input_bias", "hidden", "tau", "tau_bias")))
    synapses, traces = None, None
    if plastic:
        mode = "batch_mean" if shared else "per_sequence"
        parts = ("alpha", "eta", "decay", "largest")
        rules = (TraceRule(*(own[f"{part}_{name}"] for part in parts), mode, through) for name in ("ih", "hh"))
        start = [own[name][:1].expand(B, -1, -1) if shared else own[name] for name in ("M_ih", "M_hh")]
        synapses, traces = Synapses(*rules), Traces(*start)
    states, after = liquid_cell(
        own["x"], own["state"], weights, Norm(own["gain"], own["bias"], 1e-5), integration,
        keep=None if keep is None else keep.to(dtype), fresh=fresh, synapses=synapses, traces=traces, backend=backend,
    )  # fmt: skip
    outputs = {"states": states} | (dict(zip(("ih", "hh"), after, strict=True)) if after else {})
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=DEVICE).to(dtype) for x in outputs.values()]
    pairs = [(x, grad) for x, grad in zip(outputs.values(), upstream, strict=True) if x.requires_grad]
    wanted = {name: x for name, x in own.items() if x.requires_grad}
    ends, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(ends, list(wanted.values()), grads, allow_unused=True)
    grads = {f"grad {name}": grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
    for name in ("ih", "hh") if plastic and through else ():
        # Together: where the norm is always held, what is left of one of them is the difference of larger numbers.
        grads[f"grad rule_{name}"] = torch.stack([grads.pop(f"grad {part}_{name}").view(()) for part in parts[1:]])
    return {name: x.detach() for name, x in outputs.items()} | grads


def compare(leaves, integration, bound=5e-6, **options):
    got = outputs_and_gradients(leaves, integration, "triton", **options)
    if DEVICE == "cuda":
        again = outputs_and_gradients(leaves, integration, "triton", **options)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert_close(got, outputs_and_gradients(leaves, integration, "reference", dtype=torch.float64, **options), bound)


def dropped():
    return (torch.rand(B, T, D, device=DEVICE) > 0.3).double() / 0.7


def begun():
    """One sequence begins anew within the window, one with it."""
    fresh = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    fresh[0, 2] = fresh[1, 0] = True
    return fresh


@pytest.mark.parametrize("integration", [EULER, RK2, EXPONENTIAL, ONE], ids=lambda i: f"{i.integrator}_{i.steps}")
def test_the_kernels_equal_the_equations(integration):
    compare(make_leaves(plastic=False), integration, keep=dropped(), fresh=begun())


@pytest.mark.parametrize("through", [True, False], ids=["through", "constant"])
@pytest.mark.parametrize("integration", [RK2, EXPONENTIAL], ids=lambda i: i.integrator)
def test_the_kernels_equal_the_equations_of_traces(integration, through):
    compare(make_leaves(plastic=True), integration, keep=dropped(), fresh=begun(), through=through)


def test_a_window_without_dropout_and_beginnings():
    compare(make_leaves(plastic=True), ONE)


@pytest.mark.parametrize("through", [True, False], ids=["through", "constant"])
def test_the_kernels_equal_the_equations_of_traces_that_all_sequences_share(through):
    compare(make_leaves(plastic=True), ONE, keep=dropped(), shared=True, through=through)


def test_norms_of_some_traces_are_held():
    """Or the tests above would not see it."""
    leaves = make_leaves(plastic=True)
    free = {name: 100 * x if name.startswith("largest") else x for name, x in leaves.items()}
    got, without = (outputs_and_gradients(x, ONE, "triton") for x in (leaves, free))
    for name in ("ih", "hh"):
        norms = [torch.linalg.matrix_norm(found[name]) for found in (got, without)]
        assert (norms[0] < 0.99 * norms[1]).any()
    assert got["grad rule_ih"][2] != 0 and got["grad rule_hh"][2] != 0


@pytest.mark.parametrize("plastic, dtype", [(0, torch.float32), (1, torch.float16)], ids=["off_fp32", "on_fp16"])
def test_what_a_process_compares_first_agrees(plastic, dtype):
    """Over more tokens than the kernels take with traces at a time, and with matrices in 16 bits."""
    assert disagreement(op._comparison, torch.device(DEVICE), dtype, D, plastic) is None


def test_a_comparison_sees_a_wrong_kernel(monkeypatch):
    right = kernel.backward
    wrong = lambda *given, **options: (found := right(*given, **options))._replace(rates=1.001 * found.rates)  # noqa: E731
    monkeypatch.setattr(kernel, "backward", wrong)
    found = disagreement(op._comparison, torch.device(DEVICE), torch.float32, D, 0)
    assert found is not None and "of tau" in found


def test_matrices_may_be_cut_anyhow(monkeypatch):
    leaves = make_leaves(plastic=True, length=2, width=32)
    monkeypatch.setattr(
        kernel, "tiling_of", lambda *_: kernel.Tiling(block=16, rows=16, num_warps=4, stages=2, trace_stages=2)
    )
    compare(leaves, ONE)


@pytest.mark.slow
@torch.no_grad()
def test_a_sequence_has_the_same_bits_in_every_batch_and_without_a_gradient():
    leaves = {name: x.float() for name, x in make_leaves(plastic=True, length=18).items()}

    def read(rows):
        weights = CellWeights(*(leaves[name] for name in ("input", "input_bias", "hidden", "tau", "tau_bias")))
        parts = ("alpha", "eta", "decay", "largest")
        rules = (TraceRule(*(leaves[f"{part}_{n}"] for part in parts), "per_sequence", True) for n in ("ih", "hh"))
        traces = Traces(leaves["M_ih"][rows], leaves["M_hh"][rows])
        norm = Norm(leaves["gain"], leaves["bias"], 1e-5)
        given = leaves["x"][rows], leaves["state"][rows], weights, norm, ONE
        states, after = liquid_cell(*given, synapses=Synapses(*rules), traces=traces, backend="triton")
        assert after is not None
        return states, *after

    together, alone = read(slice(0, B)), read(slice(1, 2))
    with torch.enable_grad():
        leaves["x"].requires_grad_()
        differentiable = read(slice(0, B))
    assert differentiable[0].requires_grad
    for all_rows, row, again in zip(together, alone, differentiable, strict=True):
        assert torch.equal(all_rows, again)
        torch.testing.assert_close(all_rows[1:2], row, rtol=0, atol=0 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize("plastic", [False, True], ids=["off", "on"])
def test_nan_reaches_the_states(plastic):
    leaves = make_leaves(plastic=plastic)
    leaves["x"][1, 3, 2] = torch.nan
    states = outputs_and_gradients(leaves, RK2, "triton")["states"]
    assert states[1, 3:].isnan().all() and not states[0].isnan().any() and not states[1, :3].isnan().any()


def test_an_empty_gradient_is_zero():
    """States that no loss reads, of traces that one does."""
    leaves = {name: x.float().requires_grad_() for name, x in make_leaves(plastic=True).items()}
    found, upstream = [], draw(B, D, D).float()
    for backend in ("triton", "reference"):
        weights = CellWeights(*(leaves[name] for name in ("input", "input_bias", "hidden", "tau", "tau_bias")))
        parts = ("alpha", "eta", "decay", "largest")
        rules = (TraceRule(*(leaves[f"{part}_{n}"] for part in parts), "per_sequence", True) for n in ("ih", "hh"))
        _, after = liquid_cell(
            leaves["x"], leaves["state"], weights, Norm(leaves["gain"], leaves["bias"], 1e-5), ONE,
            synapses=Synapses(*rules), traces=Traces(leaves["M_ih"], leaves["M_hh"]), backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad((after.hh * upstream).sum(), [leaves["x"], leaves["hidden"], leaves["M_hh"]])
        found.append(dict(zip(("x", "hidden", "M_hh"), grads, strict=True)))
    assert_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize(
    "mode, plastic",
    [
        pytest.param("per_sequence", False, marks=pytest.mark.slow),
        ("per_sequence", True),
        pytest.param("batch_mean", True, marks=pytest.mark.slow),
    ],
)
def test_a_model_on_the_kernels_trains_as_on_plain_pytorch(mode, plastic, monkeypatch):
    """Windows, dropout and, where traces are of sequences, documents."""
    config = LiquidNNConfig(
        hidden_size=D,
        num_fast=1,
        num_deep=1,
        deep_steps=2,
        vocab_size=20,
        seq_length=7,
        bptt_window=4,
        trace_mode=mode,
    )
    lengths = [[7], [3, 4]] if mode == "per_sequence" else [[7], [7]]
    documents, ids = Documents.from_lengths(lengths, DEVICE), torch.randint(0, 20, (2, 7)).to(DEVICE)
    found, calls = [], []
    for runs in (True, False):
        monkeypatch.setattr(op, "runs_triton", lambda *given, runs=runs: calls.append(runs) or runs)
        model = MiniLiquidGPT(config)
        initialize(model, 0)
        model.embedding.weight.data *= 30
        model.to(DEVICE).plastic = plastic
        torch.manual_seed(0)
        loss = cross_entropy(model, ids, documents)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert calls.count(True) == 2 * 2  # cells and windows
    assert_close(found[0], found[1], 1e-4)


def test_what_the_kernels_do_not_take_runs_on_plain_pytorch(monkeypatch):
    """Adaptive steps, a width of another kind, too many evaluations, float64, and traces that differ, of a mean."""

    def refuse(*_):
        raise AssertionError("asked for the kernels")

    monkeypatch.setattr(op, "runs_triton", refuse)
    off, on = make_leaves(plastic=False), make_leaves(plastic=True)
    outputs_and_gradients(off, Integration("rk2", 2, adaptive=True), "auto")
    outputs_and_gradients(off, Integration("rk2", 9), "auto")
    outputs_and_gradients(make_leaves(plastic=False, width=24), ONE, "auto")
    outputs_and_gradients(off, ONE, "auto", dtype=torch.float64)
    outputs_and_gradients(on, ONE, "auto", shared=True, fresh=begun())
    with pytest.raises(AssertionError, match="asked"):
        outputs_and_gradients(on, ONE, "auto", shared=True)


def test_synapses_go_with_traces():
    leaves = {name: x.float() for name, x in make_leaves(plastic=False).items()}
    weights = CellWeights(*(leaves[name] for name in ("input", "input_bias", "hidden", "tau", "tau_bias")))
    norm, traces = Norm(leaves["gain"], leaves["bias"], 1e-5), Traces(draw(B, D, D).float(), draw(B, D, D).float())
    with pytest.raises(ValueError, match="go together"):
        liquid_cell(leaves["x"], leaves["state"], weights, norm, ONE, traces=traces)


def losses_of_training(config, steps, backend, monkeypatch) -> list[float]:
    """Of rows that count up, so that there is something to learn."""
    monkeypatch.setattr(op, "runs_triton", lambda *_: backend == "triton")
    model = MiniLiquidGPT(config).to(DEVICE)
    initialize(model, 0)
    model.embedding.weight.data *= 6  # or 200 steps of so few tokens learn nothing
    # At 3e-3 weights that differ by 1e-7 of themselves give losses that differ by 6 % after 60 steps, at this rate by
    # 3e-5 after 200.
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    documents, losses = Documents.whole_rows(8, config.seq_length, DEVICE), []
    for step in range(steps):
        model.start_step(step, steps)
        torch.manual_seed(step)
        first = torch.randint(0, config.vocab_size, (8, 1), device=DEVICE)
        ids = (first + torch.arange(config.seq_length, device=DEVICE)) % config.vocab_size
        optimizer.zero_grad()
        loss = cross_entropy(model, ids, documents) / documents.num_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.gpu
def test_two_hundred_steps_of_training_have_equal_losses(monkeypatch):
    """At the base size, a hundred in each phase."""
    config = LiquidNNConfig(vocab_size=50, seq_length=17, bptt_window=8)
    got, want = (losses_of_training(config, 200, backend, monkeypatch) for backend in ("triton", "reference"))
    assert want[-1] < 0.5 * want[0]
    assert got == pytest.approx(want, rel=1e-3)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lfm.kernels.liquid_cell import kernel

sizes = dict(D=32, KIND=1, KEEP=True, FRESH=True, ENDS=True, PLASTIC=True, THROUGH=True, K=16, E=16, RECORD=8, WHICH=1)
sizes |= dict(BLOCK=16, ROWS=16, STAGES=2, TRACE_STAGES=2, TILE=32)
kinds = dict.fromkeys(kernel.COUNTS, "i32") | {"epsilon": "fp32", "fresh": "*i1"}
kinds |= dict.fromkeys(("hidden", "tau", "alpha_ih", "alpha_hh"), "*bf16")
for function in (kernel._forward_kernel, kernel._backward_kernel, kernel._alpha_kernel):
    names = function.arg_names
    signature = {name: "constexpr" if name in sizes else kinds.get(name, "*fp32") for name in names}
    constants = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    source = ASTSource(function, signature, constants)
    options = {"num_warps": 4, "num_stages": 1}
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu():
    """Which needs none; the interpreter is more lenient than the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) == 3
