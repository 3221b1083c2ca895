"""Real runs, on one process and on two, and what their records say of the tokens they were fed."""

import sys

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from data_pipeline import audit
from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.data.consumed import read_record
from lfm.data.format import RowWriter
from lfm.data.order import row_order
from lfm.data.reader import ShardReader
from lfm.job.fork import run_ranks
from lfm.layout.layout import check_layout
from lfm.training.loop import train
from tests.training.tiny_run import tiny_run

OPTIONS = [
    *("training.steps=4", "schedule.kind=constant", "model.attention.num_query_groups=2", "validation.max_rows=2"),
    *("validation.every_steps=0", "checkpoint.every_steps=0", "seed=3"),
]


def train_on_two_ranks(process, output, data, options):
    run = tiny_run(output, data, *OPTIONS, "parallel.zero_stage=1", *options)
    sizes = {
        "global_batch_size": run.training.global_batch_size,
        "micro_batch_size": run.training.micro_batch_size,
    }
    train(run, process, check_layout(run.model, run.parallel, process.world_size, **sizes))


def said_by_audit(monkeypatch, capsys, *folders):
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, folders)])
    code = 0
    try:
        audit.main()
    except SystemExit as end:
        code = end.code
    return code, "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory, text_data):
    run = tiny_run(tmp_path_factory.mktemp("one"), text_data, *OPTIONS)
    train(run)
    return run.folder


@pytest.mark.slow
def test_other_layouts_interrupted_and_resumed_were_fed_the_same(
    on_one_process, text_data, tmp_path, monkeypatch, capsys
):
    first = ["training.steps=2", "training.micro_batch_size=1", "data.prefetch_threads=0"]
    run_ranks(train_on_two_ranks, 2, tmp_path, text_data, first)
    then = ["parallel.pipeline=2", "training.micro_batch_size=2", "data.prefetch_threads=1"]
    run_ranks(train_on_two_ranks, 2, tmp_path, text_data, then)
    folder = tmp_path / "lfm_debug"
    assert read_record(folder) == read_record(on_one_process)
    code, said = said_by_audit(monkeypatch, capsys, folder, on_one_process)
    chain = read_record(folder)[-1].chain
    assert (code, said.splitlines()[-1]) == (0, f"same: steps 1 to 4, chain {chain}")
    manifest = read_manifest(checkpoint.find(folder))
    assert manifest["progress"]["chain"] == chain


def test_two_rows_that_changed_places_are_found_at_their_step(on_one_process, text_data, tmp_path, monkeypatch, capsys):
    reader = ShardReader(text_data / "train")
    order = row_order(3, len(reader), 0, 16).tolist()
    a, b = order[9], order[14]  # of the third step and the fourth
    data = tmp_path / "data"
    data.mkdir()
    for path in (text_data / "validation", text_data / "tokenizer.json"):
        (data / path.name).symlink_to(path)
    index = reader.index
    writer = RowWriter(data / "train", seq_length=64, vocab_size=512, shard_bytes=1 << 20, compression=None)
    for row in range(len(reader)):
        batch = reader.read([{a: b, b: a}.get(row, row)])
        writer.write(batch.ids[0].numpy(), batch.lengths[0])
    writer.finish(
        split="train",
        eod_id=index.eod_id,
        tokenizer_sha256=index.tokenizer_sha256,
        num_tokens=index.num_tokens,
        num_padding=index.num_padding,
        num_documents=1,
        text_bytes=1,
    )
    assert not torch.equal(reader.read([a]).ids, reader.read([b]).ids)
    run = tiny_run(tmp_path, data, *OPTIONS)
    train(run)
    code, said = said_by_audit(monkeypatch, capsys, on_one_process, run.folder)
    assert code == 1 and "\ndifferent: step 3 is the first; its digests are " in said


def test_audit_of_folders_that_hold_no_record_is_a_users_error(on_one_process, tmp_path, monkeypatch, capsys):
    code, said = said_by_audit(monkeypatch, capsys, on_one_process, tmp_path)
    assert code == 2 and f"error: {tmp_path}/consumed.txt cannot be read" in said
