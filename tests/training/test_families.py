"""Every family through the whole of training: real text, real checkpoints, resumed bit for bit, generated from."""

import sys
from pathlib import Path

import pytest
import torch

from lfm.data.stream import open_split
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.held_out import evaluate
from lfm.inference.conversation import Conversation
from lfm.inference.load import open_model
from lfm.inference.sampling import SamplingConfig, generate
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT, assert_same_checkpoint

TINY = {
    "laerc": ["model.hidden_size=16", "model.num_layers=2"],
    "liquidlm": ["model.hidden_size=16", "model.reservoir_size=32"],
    "liquidnn": ["model.hidden_size=16", "model.plastic_from=0.5", "model.dropout=0.1"],
    "liquidnet": ["model.hidden_size=16", "model.num_layers=2", "model.ffn.ffn_hidden_size=24"],
    "transformer": ["model.hidden_size=16", "model.num_layers=2", "model.ffn.ffn_hidden_size=24"],
    "lstm": ["model.hidden_size=16", "model.num_layers=2", "model.hidden_dropout=0.1"],
}
STREAMING = sorted(TINY.keys() - {"transformer"})


def run_of(kind: str, output: Path, data: Path, *more: str) -> RunConfig:
    """Six steps on rows of 64, validated and saved after the third and the last."""
    common = [
        *("model.vocab_size=512", "model.seq_length=64", "training.steps=6", "training.global_batch_size=4"),
        *("training.micro_batch_size=2", "validation.every_steps=3", "validation.max_rows=4", "checkpoint.keep=9"),
        *("checkpoint.every_steps=3", "samples.every_steps=0", "samples.sampling.max_new_tokens=3"),
        *("logging.every_steps=1", "logging.tensorboard=false", f"output={output}", f"data.path={data}"),
    ]
    if kind == "liquidlm":  # its schedule counts on hundreds of steps
        common.append("schedule.warmup_fraction=0.2")
    return RunConfig.load(ROOT / f"configs/{kind}_debug.yaml", [*TINY[kind], *common, *more])


@pytest.fixture(scope="module", params=sorted(TINY))
def trained(request, tmp_path_factory, text_data) -> tuple[str, RunConfig]:
    run = run_of(request.param, tmp_path_factory.mktemp(request.param), text_data)
    train(run)
    return request.param, run


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, tmp_path, text_data):
    kind, whole = trained
    half = whole.folder / "checkpoints/step_00000003"
    resumed = run_of(kind, tmp_path, text_data, f"checkpoint.resume={half}")
    train(resumed)
    assert_same_checkpoint(resumed.folder / "checkpoints/step_00000006", whole.folder / "checkpoints/step_00000006")


def test_records_hold_what_the_family_has(trained):
    kind, run = trained
    records = read_metrics(run.folder / "metrics.jsonl")
    losses = [record["cross_entropy"] for record in records if "cross_entropy" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert not any("expert_load" in record or "reservoir_residual" in record for record in records)
    last = [record for record in records if "validation_loss" in record][-1]
    modes = {key for key in last if key.startswith("validation_loss_")}
    if kind == "liquidnn":  # both ways in each validation; the headline is the way training goes
        assert modes == {"validation_loss_plasticity_off", "validation_loss_plasticity_on"}
        assert last["validation_loss"] == last["validation_loss_plasticity_on"]
        assert last["validation_loss_plasticity_on"] != last["validation_loss_plasticity_off"]
    else:
        assert not modes


def test_generation_does_not_depend_on_the_other_prompts(trained):
    _, run = trained
    model, tokenizer, _ = open_model(run.folder, device="cpu")
    prompts = [tokenizer.encode(text) for text in ("def f(self", "import json\nclass ", "x")]
    sampling = SamplingConfig(max_new_tokens=8, greedy=True)
    together = list(zip(*generate(model, prompts, sampling, end_of_document=None), strict=True))
    alone = [[token for (token,) in generate(model, [p], sampling, end_of_document=None)] for p in prompts]
    assert [list(tokens) for tokens in together] == alone


def test_a_conversation_reads_nothing_twice_and_forgets_nothing(trained):
    kind, run = trained
    model, tokenizer, _ = open_model(run.folder, device="cpu")
    talk = Conversation(model, SamplingConfig(max_new_tokens=4, greedy=True), end_of_document=None)
    with pytest.raises(UserError, match="nothing to reply to"):
        next(talk.reply())
    first, second = tokenizer.encode("import os\n"), tokenizer.encode("def g(")
    talk.read(first)
    said = list(talk.reply())
    sizes = [talk.state.num_bytes]
    talk.read(second)
    sizes.append(talk.state.num_bytes)
    assert talk.num_tokens == len(first) + len(said) + len(second)
    whole, _ = model(torch.tensor([[*first, *said, *second]]))
    assert torch.allclose(model.logits(talk.hidden)[0], whole[0, -1], atol=1e-4)
    assert (sizes[0] == sizes[1]) == (kind in STREAMING)
    talk.reset()
    assert talk.num_tokens == 0 and talk.state is None


@pytest.mark.parametrize("kind", STREAMING)
def test_a_saved_state_goes_on_and_only_with_its_own_weights(kind, tmp_path, text_data):
    run = run_of(kind, tmp_path, text_data, "training.steps=1", "validation.max_rows=1")
    train(run)
    model, tokenizer, _ = open_model(run.folder, device="cpu")
    sampling, file = SamplingConfig(max_new_tokens=4, greedy=True), tmp_path / "state"
    talk = Conversation(model, sampling, end_of_document=None)
    talk.read(tokenizer.encode("import os\nclass "))
    talk.save(file, checkpoint="a")
    again = Conversation(model, sampling, end_of_document=None)
    again.load(file, checkpoint="a")
    assert again.num_tokens == talk.num_tokens and list(again.reply()) == list(talk.reply())

    with pytest.raises(UserError, match=r"is of another model \(a, not b\)"):
        again.load(file, checkpoint="b")
    file.write_bytes(b"text")
    with pytest.raises(UserError, match="is not a saved state"):
        again.load(file, checkpoint="a")


def test_a_growing_state_is_not_kept_in_files(tmp_path, text_data):
    run = run_of("transformer", tmp_path, text_data, "training.steps=1", "validation.max_rows=1")
    train(run)
    model, tokenizer, _ = open_model(run.folder, device="cpu")
    talk = Conversation(model, SamplingConfig(max_new_tokens=4), end_of_document=None)
    with pytest.raises(UserError, match="grows with its text"):
        talk.load(tmp_path / "state", checkpoint="a")
    with pytest.raises(UserError, match="leave no room in the context of 64"):
        talk.read(tokenizer.encode("import os\n" * 40))
    assert talk.num_tokens == 0
    talk.read(tokenizer.encode("x = 1\n" * 40)[:60])
    assert len(list(talk.reply())) == 3, "a reply ends where the context does"


def test_a_checkpoint_of_another_family_is_refused(tmp_path, text_data):
    first = run_of("lstm", tmp_path, text_data, "training.steps=1", "validation.max_rows=1", "name=one")
    train(first)
    files = sorted(path.name for path in (first.folder / "checkpoints").rglob("*"))
    other = run_of("laerc", tmp_path, text_data, "name=one", "training.steps=2")
    with pytest.raises(UserError, match="is of family lstm and the config of family laerc"):
        train(other)
    assert sorted(path.name for path in (first.folder / "checkpoints").rglob("*")) == files


def test_what_a_family_does_not_have_is_refused(tmp_path, text_data):
    with pytest.raises(UserError, match=r"training.recompute=full is not for model.kind=laerc; choose from none"):
        run_of("laerc", tmp_path, text_data, "training.recompute=full")


@pytest.mark.parametrize("kind", sorted(TINY))
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(kind, tmp_path, text_data):
    """From a real cause: a learning rate at which the weights overflow."""
    run = run_of(kind, tmp_path, text_data, "optimizer.lr=1e30", "schedule.warmup_steps=0", "optimizer.groups=[]")
    with pytest.raises(NonFiniteError, match=r"step \d: .*no update was made; the batch is data rows \["):
        train(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laerc", "liquidlm", "liquidnn", "liquidnet", "transformer", "lstm"])
def test_each_debug_preset_learns_more_than_single_tokens(name, tmp_path):
    """Minutes each: the shipped preset as it is, on real text, to below the unigram entropy of the held-out tokens."""
    from data_pipeline.prepare import prepare
    from data_pipeline.prepare_config import PrepareConfig

    data = tmp_path / "data"
    prepare(PrepareConfig.load(ROOT / "configs/data/stdlib_8k.yaml", [f"output={data}"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = RunConfig.load(ROOT / f"configs/{name}_debug.yaml", [f"data.path={data}", f"output={tmp_path}"])
        train(run)
    finally:
        torch.set_num_threads(threads)
    model, _, _ = open_model(run.folder, device="cpu")
    rows = open_split(run.data, "validation", seq_length=256, vocab_size=8192)
    from functools import partial

    from lfm.evaluation.held_out import score

    found = evaluate(partial(score, model), rows)
    counts = torch.tensor(found.token_counts[found.token_counts > 0], dtype=torch.float64)
    entropy = float(-(counts / counts.sum() * (counts / counts.sum()).log()).sum())
    print(f"{name}: {found.loss:.3f} nats a token, unigram entropy {entropy:.3f}", file=sys.stderr)
    assert found.loss < entropy
