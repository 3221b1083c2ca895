"""Steps that are recorded and replayed next to steps that are made kernel by kernel: all numbers, to the bit."""

import itertools
import math

import pytest
import torch

from lfm.data.batch import Batch
from lfm.errors import NonFiniteError, UserError
from lfm.layers.lstm import StackedLSTM
from lfm.models.laerc import LAERCConfig
from lfm.models.lfm import LFMConfig
from lfm.models.liquidlm import LiquidLMConfig
from lfm.models.liquidnet import LiquidNetConfig
from lfm.models.liquidnn import LiquidNNConfig
from lfm.models.lstm import LSTMConfig
from lfm.models.transformer import TransformerConfig
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.lion import LionConfig
from lfm.training.recorder import REHEARSALS, CannotRecord, Recorder
from lfm.training.run import RunConfig
from tests.nested import nested
from tests.training.tape import TapeRecorder
from tests.training.tiny_run import ROOT, TINY, assert_same_checkpoint, tiny_run

T, V, ROWS, STEPS = 24, 40, 4, 22
SMALL = {"hidden_size": 16, "num_layers": 2, "seq_length": T, "vocab_size": V}
HEADS = {"num_attention_heads": 2, "num_query_groups": 1}
RESERVOIRS = {"kind": "reservoir", "interval": 2, "num_reservoirs": 2, "reservoir_size": 8, "chunk_length": 6}

ATTENDING = {
    backend: TransformerConfig(**SMALL, **nested(ffn_hidden_size=24), attention={**HEADS, "backend": backend})
    for backend in ("reference", "sdpa")
}

OF_LFM = {
    *("model.attention.num_attention_heads", "model.attention.num_query_groups", "model.ffn.moe_ffn_hidden_size"),
    *("model.liquid.interval", "model.liquid.reservoir_size", "model.liquid.chunk_length"),
}
"""Keys of TINY that another family has not."""

LSTMS = ("liquidlm", "lstm")
"""By torch's library they take packed rows by their lengths."""

FAMILIES = {
    "liquidnet": LiquidNetConfig(**nested(**SMALL, ffn_hidden_size=24)),
    "transformer": ATTENDING["reference"],
    "laerc": LAERCConfig(**SMALL, reservoir_multiple=1.5),
    "laerc_chunked": LAERCConfig(**SMALL, reservoir_multiple=1.5, backend="chunked", chunk_length=6, warmup=32),
    "lfm_dense": LFMConfig(
        **{**SMALL, "num_layers": 3}, **nested(ffn_hidden_size=24), attention={**HEADS, "backend": "reference"},
        liquid=RESERVOIRS,
    ),
    "liquidlm": LiquidLMConfig(**SMALL, reservoir_size=24, hidden_dropout=0.3),
    "liquidnn": LiquidNNConfig(
        hidden_size=8, num_fast=0, num_deep=1, deep_steps=1, seq_length=T, vocab_size=V, bptt_window=12
    ),
    "lstm": LSTMConfig(**SMALL, hidden_dropout=0.3),
}  # fmt: skip


def engine_of(model, *, recorded, micro_batch_size=2, dtype=torch.float32, optimizer=None, **options) -> LocalEngine:
    engine = LocalEngine(
        model,
        optimizer or AdamWConfig(lr=1e-2, clip_grad=0.5),
        seed=7,
        device=torch.device("cpu"),
        dtype=dtype,
        micro_batch_size=micro_batch_size,
        cuda_graph="required" if recorded else "off",
        **options,
    )
    if recorded:
        engine.recorder = TapeRecorder()
    return engine


def batch(step, *, packed=True, masked=False, rows=ROWS) -> Batch:
    draws = torch.Generator().manual_seed(step)
    ids = torch.randint(0, V, (rows, T), generator=draws)
    ends = [sorted({T, *torch.randint(1, T, (row % 3,), generator=draws).tolist()}) for row in range(rows)]
    lengths = [[b - a for a, b in zip([0, *row], row, strict=False)] for row in ends]
    mask = torch.rand(ids.shape, generator=draws) < 0.6 if masked else None
    return Batch(ids, lengths if packed else [[T]] * rows, mask)


def numbers(engine, step, given, lr) -> tuple:
    engine.start_step(step, STEPS)
    result, norm = engine.update(given, lr)
    return result, norm, engine.optimizer_step, engine.state_values()


def assert_same_state(a, b):
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for name, master in a.masters.items():
        assert torch.equal(master.grad, b.masters[name].grad), name
        if a.masters[name] is not dict(a.model.named_parameters())[name]:
            assert torch.equal(dict(a.model.named_parameters())[name], dict(b.model.named_parameters())[name]), name


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "liquidnn" else ()) for name in FAMILIES]
)
def test_replayed_steps_are_those_made_op_by_op(family, masked):
    """With a schedule, packed rows, two micro-batches, and validation."""
    model = FAMILIES[family]
    packed = family not in LSTMS
    dtype = torch.bfloat16 if masked and family != "laerc_chunked" else torch.float32
    recorded, plain = (engine_of(model, recorded=each, dtype=dtype) for each in (True, False))
    for step in range(STEPS):
        given, lr = batch(step, packed=packed, masked=masked), 1e-2 * (1 - step / STEPS)
        assert numbers(recorded, step, given, lr) == numbers(plain, step, given, lr)
        if step % 8 == 5:
            assert recorded.evaluate(batch(100)) == plain.evaluate(batch(100))
    assert_same_state(recorded, plain)
    # Of each step two micro-batches and an update.
    assert recorded.recorder.replayed >= 3 * (STEPS - REHEARSALS - 1) - 6


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_micro_batches_that_are_not_full_and_kinds_of_rows_that_change(rows):
    recorded, plain = (engine_of(FAMILIES["liquidnet"], recorded=each) for each in (True, False))
    for step in range(12):
        given = batch(step, packed=step % 3 > 0, masked=step % 2 > 0, rows=rows)
        assert numbers(recorded, step, given, 1e-2) == numbers(plain, step, given, 1e-2)
    assert_same_state(recorded, plain)


def test_a_step_goes_on_from_a_loaded_state():
    """What is loaded goes into the tensors that a recording reads and writes."""
    recorded, plain = (engine_of(FAMILIES["liquidnet"], recorded=each, dtype=torch.bfloat16) for each in (True, False))
    early, values = None, None
    for step in range(12):
        if step == 5:
            early, values = {k: x.clone() for k, x in recorded.tensors().items()}, recorded.state_values()
        for engine in (recorded, plain):
            numbers(engine, step, batch(step), 1e-2)
    assert early is not None and values is not None
    for engine in (recorded, plain):
        engine.load_state_tensors(lambda targets: [targets[key].copy_(early[key]) for key in targets])
        engine.load_state_values(values)
    for step in range(5, 9):
        assert numbers(recorded, step, batch(step + 50), 1e-2) == numbers(plain, step, batch(step + 50), 1e-2)
    assert recorded.optimizer_step == 9
    assert_same_state(recorded, plain)


def test_chunks_that_disagree_are_repaired_and_move_the_warmup():
    """The recorded step believes no residual: the host hears of it, and makes the step again with repairs."""
    keys = {"backend": "chunked", "chunk_length": 16, "warmup": 32, "spectral_norm": 3.0, "tolerance": 1e-4}
    model = LAERCConfig(**{**SMALL, "seq_length": 4 * T}, **keys)
    recorded, plain = (engine_of(model, recorded=each) for each in (True, False))
    repairs = 0
    for step in range(8):
        ids = torch.randint(0, V, (ROWS, 4 * T), generator=torch.Generator().manual_seed(step))
        given = Batch(ids, [[4 * T]] * ROWS)
        ours, theirs = (numbers(engine, step, given, 1e-2) for engine in (recorded, plain))
        assert ours == theirs
        repairs += sum(ours[0].measured["reservoir_repair_passes"].values())
    assert repairs > 0 and set(recorded.state_values()["reservoir_warmup"].values()) != {32}
    assert_same_state(recorded, plain)


@pytest.mark.parametrize("step", [0, 6])
def test_a_non_finite_loss_names_its_rows_and_changes_nothing(step):
    engine = engine_of(ATTENDING["reference"], recorded=True)
    for earlier in range(step):
        numbers(engine, earlier, batch(earlier), 1e-2)
    before = {key: x.clone() for key, x in engine.tensors().items()}
    spoilt = engine.model.final_norm.weight.detach()
    kept = spoilt.clone()
    spoilt[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"loss is not finite in rows 0 to 1 of the batch"):
        numbers(engine, step, batch(step), 1e-2)
    spoilt.copy_(kept)
    assert all(torch.equal(x, before[key]) for key, x in engine.tensors().items())
    assert engine.optimizer_step == step


def test_a_non_finite_gradient_is_named_and_changes_nothing():
    engine = engine_of(FAMILIES["liquidnet"], recorded=True)
    engine.model.final_norm.weight.register_hook(lambda grad: grad * torch.inf)
    before = {key: x.clone() for key, x in engine.tensors().items()}
    for step in range(4):
        with pytest.raises(NonFiniteError, match=r"gradient norm is (nan|inf); .* final_norm\.weight"):
            numbers(engine, step, batch(step), 1e-2)
    assert all(torch.equal(x, before[key]) for key, x in engine.tensors().items())


def test_an_overflow_of_float16_skips_the_update_and_halves_the_scale():
    recorded, plain = (
        engine_of(FAMILIES["liquidnet"], recorded=each, dtype=torch.float16, initial_loss_scale=2.0**40)
        for each in (True, False)
    )
    norms = []
    for step in range(STEPS):
        ours, theirs = (numbers(engine, step, batch(step), 1e-3) for engine in (recorded, plain))
        assert ours == theirs and recorded.record() == plain.record()
        norms.append(ours[1])
    assert math.inf in norms and math.isfinite(norms[-1])
    assert_same_state(recorded, plain)


OBSTACLES = {
    "packed LSTM": (
        FAMILIES["lstm"],
        AdamWConfig(),
        r"documents are told apart by their lengths, which the host reads",
    ),
    "steps": (
        LiquidNNConfig(hidden_size=16, seq_length=T, vocab_size=V, bptt_window=8, adaptive_steps=True),
        AdamWConfig(),
        r"the host reads how many steps the time constants of a token need",
    ),
    "optimizer": (FAMILIES["liquidnet"], LionConfig(), r"the update of optimizer\.kind=lion waits for the device"),
    "lengths": (
        ATTENDING["sdpa"],
        AdamWConfig(),
        r"documents are told apart by their lengths, which the host reads",
    ),
    "experts": (
        LFMConfig(**SMALL, **nested(moe_ffn_hidden_size=8, num_moe_experts=4), attention=HEADS, liquid=None),
        AdamWConfig(),
        r"experts take as many rows as tokens chose them, which only their bf16 kernels take from the device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OBSTACLES)
def test_where_the_device_alone_cannot_make_a_step_one_line_says_why(case, capsys):
    model, optimizer, why = OBSTACLES[case]
    recorded, plain = (engine_of(model, recorded=each, optimizer=optimizer) for each in (True, False))
    with pytest.raises(UserError, match=rf"training\.cuda_graph=required: .*{why}; set it to auto"):
        numbers(recorded, 0, batch(0), 1e-3)
    recorded.cuda_graph, recorded.recorder = "auto", Recorder(torch.device("cpu"))
    for step in range(3):
        assert numbers(recorded, step, batch(step), 1e-3) == numbers(plain, step, batch(step), 1e-3)
    said = capsys.readouterr().err
    assert said.count("steps are launched kernel by kernel, because") == 1 and why.replace("\\", "") in said
    assert_same_state(recorded, plain)


def test_what_reads_a_number_is_not_recorded(capsys):
    engine = engine_of(FAMILIES["liquidnet"], recorded=True)
    engine.cuda_graph = "auto"
    final_norm = engine.model.final_norm
    final_norm.register_forward_hook(
        lambda module, given, made: made * (1.0 if float(made.detach().sum()) < math.inf else 2.0)
    )
    for step in range(REHEARSALS + 2):
        numbers(engine, step, batch(step), 1e-3)
    assert engine.recorder is None and "something in it waits for the device" in capsys.readouterr().err


@pytest.mark.parametrize("call", [0, 3, 5])
def test_a_backward_pass_that_cannot_be_recorded_leaves_nothing_to_the_step_made_instead(call, capsys):
    """In the backward pass of this number, of two a step, small gradients wait for each other when it ends early."""
    recorded, plain = (engine_of(FAMILIES["liquidnet"], recorded=each) for each in (True, False))
    recorded.cuda_graph, calls = "auto", itertools.count()

    def hook(gradient):
        if next(calls) == call:
            raise CannotRecord("a test says so")

    parameters = dict(recorded.model.named_parameters())
    parameters[next(name for name in parameters if "layers.0." in name and "norm" in name)].register_hook(hook)
    for step in range(call // 2 + 2):
        assert numbers(recorded, step, batch(step), 1e-2) == numbers(plain, step, batch(step), 1e-2)
    assert recorded.recorder is None and "a test says so" in capsys.readouterr().err
    assert_same_state(recorded, plain)


def test_a_step_that_does_not_fit_beside_recordings_is_made_without_them(capsys):
    recorded, plain = (engine_of(FAMILIES["liquidnet"], recorded=each) for each in (True, False))
    recorded.cuda_graph, full = "auto", []

    def hook(module, given, made):
        if full:
            raise torch.OutOfMemoryError(full.pop())

    recorded.model.final_norm.register_forward_hook(hook)
    for step in range(REHEARSALS + 1):
        assert numbers(recorded, step, batch(step), 1e-2) == numbers(plain, step, batch(step), 1e-2)
    full.append("a test says so")
    for step in range(REHEARSALS + 1, REHEARSALS + 3):  # of another kind of rows, which is rehearsed
        given = batch(step, packed=False)
        assert numbers(recorded, step, given, 1e-2) == numbers(plain, step, given, 1e-2)
    assert recorded.recorder is None and "beside recordings of others" in capsys.readouterr().err
    assert_same_state(recorded, plain)


def test_memory_that_no_recording_takes_is_an_error_as_ever():
    engine = engine_of(FAMILIES["liquidnet"], recorded=True)

    def hook(module, given, made):
        raise torch.OutOfMemoryError("a test says so")

    engine.model.final_norm.register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match="a test says so"):
        numbers(engine, 0, batch(0), 1e-2)


def test_required_needs_a_gpu_and_one_process(tmp_path, text_data):
    with pytest.raises(UserError, match=r"training\.cuda_graph=required needs a CUDA GPU, and this run trains on cpu"):
        train(tiny_run(tmp_path, text_data, "training.cuda_graph=required", "training.device=cpu"))
    with pytest.raises(UserError, match=r"training\.cuda_graph=required does not go with parallel\.zero_stage=1"):
        RunConfig.load("configs/lfm_debug.yaml", ["training.cuda_graph=required", "parallel.zero_stage=1"])


EXPERTS = LFMConfig(
    **{**SMALL, "num_layers": 3},
    **nested(moe_ffn_hidden_size=24, num_moe_experts=4),
    attention={**HEADS, "backend": "reference"},
    liquid=RESERVOIRS,
)
"""A recording of them takes kernels that only GPUs have."""


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*FAMILIES, "lfm_experts"])
def test_a_graph_on_a_gpu_is_the_step_made_kernel_by_kernel(family):
    model = EXPERTS if family == "lfm_experts" else FAMILIES[family]
    engines = [
        LocalEngine(
            model,
            AdamWConfig(lr=1e-2, clip_grad=0.5),
            seed=7,
            device=torch.device("cuda"),
            dtype=torch.float32 if "laerc" in family else torch.bfloat16,
            micro_batch_size=2,
            cuda_graph=mode,
        )
        for mode in ("required", "off")
    ]
    for module in engines[1].model.modules():
        if isinstance(module, StackedLSTM):
            module.backend = "steps"  # what is recorded, where a library's kernels round otherwise
    packed = family not in LSTMS
    for step in range(STEPS):
        given = batch(step, packed=packed, masked=True)
        ours, theirs = (numbers(engine, step, given, 1e-2) for engine in engines)
        assert ours == theirs
    assert_same_state(*engines)


@pytest.mark.gpu
def test_no_recording_where_it_would_leave_too_little_memory(capsys):
    model, device = FAMILIES["liquidnet"], torch.device("cuda")
    recorded, plain = (
        LocalEngine(
            model,
            AdamWConfig(lr=1e-2),
            seed=7,
            device=device,
            dtype=torch.bfloat16,
            micro_batch_size=2,
            cuda_graph=mode,
        )
        for mode in ("auto", "off")
    )
    try:
        # The most that was held at once stands for what a step takes.
        held = torch.empty(
            6 * torch.cuda.get_device_properties(device).total_memory // 10, dtype=torch.uint8, device=device
        )
        del held
        for step in range(REHEARSALS + 2):
            given = batch(step)
            assert numbers(recorded, step, given, 1e-2) == numbers(plain, step, given, 1e-2)
        assert recorded.recorder is None
        assert "training.cuda_graph=required tries it" in capsys.readouterr().err
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, text_data):
    def run(name, *more):
        given = [key for key in TINY if key.partition("=")[0] not in OF_LFM]
        given += [f"output={tmp_path / name}", f"data.path={text_data}", "training.cuda_graph=required"]
        given += ["training.steps=8", "checkpoint.keep=4", *more]
        return RunConfig.load(ROOT / "configs/liquidnet_debug.yaml", given)

    whole = run("whole")
    train(whole)
    half = whole.folder / "checkpoints/step_00000004"
    resumed = run("resumed", f"checkpoint.resume={half}")
    train(resumed)
    last = "checkpoints/step_00000008"
    assert_same_checkpoint(resumed.folder / last, whole.folder / last)
