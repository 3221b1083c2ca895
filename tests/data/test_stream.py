import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm.data.format import read_index
from lfm.data.order import row_order
from lfm.data.reader import ShardReader
from lfm.data.stream import BatchStream, DataConfig, open_split, resume_row
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.files import write_durably
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE, make_data_set, texts

SIZES = {"seq_length": SEQ_LENGTH, "vocab_size": VOCAB_SIZE}


def take(stream, steps):
    batches = [stream.next() for _ in range(steps)]
    return torch.cat([batch.ids for batch in batches]), [lengths for batch in batches for lengths in batch.lengths]


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_steps_follow_row_order_across_epochs(threads, raw_data_set):
    reader = ShardReader(raw_data_set / "validation")
    steps = 2 * len(reader) // 3 + 2
    stream = BatchStream(reader, seed=3, rows_per_step=3, prefetch_threads=threads)
    ids, lengths = take(stream, steps)
    stream.close()
    want = reader.read(row_order(3, len(reader), 0, 3 * steps))
    assert torch.equal(ids, want.ids) and lengths == want.lengths


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 2]))
def test_resuming_anywhere_gives_the_same_rest(raw_data_set, steps, rows, rows_later, threads):
    reader = ShardReader(raw_data_set / "train")
    first = BatchStream(reader, seed=1, rows_per_step=rows, prefetch_threads=threads)
    for _ in range(steps):
        first.next()
    state = first.state()
    first.close()
    assert state["position"] == steps * rows  # what was read ahead does not count
    resumed = BatchStream(
        reader,
        seed=1,
        rows_per_step=rows_later,
        start_row=resume_row(state, reader, seed=1),
        prefetch_threads=threads,
    )
    ids, _ = take(resumed, 3)
    resumed.close()
    assert torch.equal(ids, reader.read(row_order(1, len(reader), steps * rows, 3 * rows_later)).ids)


@pytest.mark.parametrize("threads", [0, 2])
def test_seeking_drops_what_was_read_ahead_and_goes_on_there(threads, raw_data_set):
    reader = ShardReader(raw_data_set / "train")
    stream = BatchStream(reader, seed=1, rows_per_step=3, prefetch_threads=threads)
    take(stream, 4)
    for row in (3, 40, 0):
        stream.seek(row)
        assert stream.position == row
        ids, _ = take(stream, 2)
        assert torch.equal(ids, reader.read(row_order(1, len(reader), row, 6)).ids)
        assert stream.state()["position"] == row + 6
    stream.close()


def test_ranks_that_take_a_part_each_have_the_whole_step_together(raw_data_set):
    reader = ShardReader(raw_data_set / "train")
    whole, _ = take(BatchStream(reader, seed=0, rows_per_step=6), 4)
    parts = [
        take(BatchStream(reader, seed=0, rows_per_step=6, take=slice(rank, None, 2), prefetch_threads=1), 4)[0]
        for rank in range(2)
    ]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize("threads", [0, 2])
def test_error_comes_at_the_step_that_needs_the_shard_and_is_never_skipped(threads, data_set):
    damaged = data_set / "train" / "shard.00003.mds"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    reader = ShardReader(data_set / "train")
    first_row = sum(shard["samples"] for shard in read_index(data_set / "train")[1][:3])
    bad_rows = range(first_row, first_row + read_index(data_set / "train")[1][3]["samples"])
    order = row_order(0, len(reader), 0, len(reader))
    bad_step = min(position // 2 for position, row in enumerate(order) if row in bad_rows)
    stream = BatchStream(reader, seed=0, rows_per_step=2, prefetch_threads=threads)
    for _ in range(bad_step):
        stream.next()
    for _ in range(3):
        with pytest.raises(UserError, match=r"shard\.00003\.mds"):
            stream.next()
    assert stream.position == 2 * bad_step
    stream.close()


def test_resuming_with_another_seed_or_data_set_is_an_error(raw_data_set):
    reader = ShardReader(raw_data_set / "train")
    state = BatchStream(reader, seed=1, rows_per_step=2).state()
    with pytest.raises(UserError, match="seed=1, the run has seed=2"):
        resume_row(state, reader, seed=2)
    with pytest.raises(UserError, match="is not the data set the checkpoint was trained on"):
        resume_row(state, ShardReader(raw_data_set / "validation"), seed=1)


def test_process_with_a_stream_left_open_ends(raw_data_set):
    program = (
        "import sys; from lfm.data.reader import ShardReader; from lfm.data.stream import BatchStream\n"
        f"reader = ShardReader({str(raw_data_set / 'train')!r})\n"
        "stream = BatchStream(reader, seed=0, rows_per_step=4, prefetch_threads=2)\n"
        "stream.next()\n"
        "print(sorted({'transformers', 'torchvision', 'streaming', 'streaming.base'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_fresh_process_reads_a_remote_data_set(zstd_data_set, tmp_path):
    program = (
        "from lfm.data.reader import ShardReader\n"
        f"reader = ShardReader({str(tmp_path / 'cache')!r}, remote='file://{zstd_data_set / 'train'}')\n"
        "print(reader.read([0]).ids.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"torch.Size([1, {SEQ_LENGTH}])\n", "")


def test_open_split_reads_a_good_data_set_locally_and_through_a_cache(raw_data_set, tmp_path):
    local = open_split(DataConfig(path=str(raw_data_set)), "train", **SIZES)
    config = DataConfig(path=str(tmp_path / "cache"), remote=f"{raw_data_set}/")
    cached = open_split(config, "train", **SIZES)
    assert len(local) == len(cached) > 0
    assert torch.equal(local.read([0, 5]).ids, cached.read([0, 5]).ids)


def test_missing_data_set_is_an_error_that_says_how_to_make_it(raw_data_set, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"make it with `lfm prepare FILE output="):
            open_split(DataConfig(path=str(path)), "train", **SIZES)


def test_other_seq_length_is_an_error(raw_data_set):
    with pytest.raises(UserError, match=r"seq_length=32 but the run asks for seq_length=64"):
        open_split(DataConfig(path=str(raw_data_set)), "train", seq_length=64, vocab_size=VOCAB_SIZE)


def test_vocabulary_that_does_not_fit_is_an_error(raw_data_set):
    config = DataConfig(path=str(raw_data_set))
    with pytest.raises(UserError, match=r"has 320 ids, more than the model's vocab_size=300"):
        open_split(config, "train", seq_length=SEQ_LENGTH, vocab_size=300)
    with pytest.raises(
        UserError, match=r"fewer than the model's vocab_size=512; set data\.allow_smaller_tokenizer=true"
    ):
        open_split(config, "train", seq_length=SEQ_LENGTH, vocab_size=512)
    allowed = DataConfig(path=str(raw_data_set), allow_smaller_tokenizer=True)
    assert len(open_split(allowed, "train", seq_length=SEQ_LENGTH, vocab_size=512)) > 0


def test_tokenizer_that_did_not_make_the_shards_is_an_error(data_set):
    config = DataConfig(path=str(data_set))
    (data_set / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        open_split(config, "train", **SIZES)
    train_bpe(texts(100), VOCAB_SIZE).save(data_set / "tokenizer.json")
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"{split} are of another tokenizer"):
            open_split(config, split, **SIZES)


def test_validation_split_of_another_tokenizer_is_an_error(data_set, tmp_path):
    other = make_data_set(tmp_path / "other", num_documents=150)
    for file in (data_set / "validation").iterdir():
        file.unlink()
    for file in (other / "validation").iterdir():
        write_durably(data_set / "validation" / file.name, file.read_bytes())
    open_split(DataConfig(path=str(data_set)), "train", **SIZES)
    with pytest.raises(UserError, match="validation are of another tokenizer"):
        open_split(DataConfig(path=str(data_set)), "validation", **SIZES)
