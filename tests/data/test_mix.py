import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.batch import Batch
from lfm.data.format import SplitIndex
from lfm.data.mix import MixedReader, Segment, cycle_parts, stream_seed
from lfm.data.order import row_order
from lfm.data.reader import RowReader, ShardReader
from lfm.data.stream import BatchStream, DataConfig, open_tokenizer, open_training, open_validation, resume_row
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE, config, make_data_set, texts, write_texts

SIZES = {"seq_length": SEQ_LENGTH, "vocab_size": VOCAB_SIZE}


class Numbered(RowReader):
    """Rows that hold the stream's and their own number."""

    def __init__(self, number: int, num_rows: int) -> None:
        self.number = number
        self.index = SplitIndex(
            format_version=1,
            split="train",
            seq_length=2,
            vocab_size=1000,
            dtype="uint16",
            eod_id=0,
            tokenizer_sha256="",
            num_rows=num_rows,
            num_tokens=2 * num_rows,
            num_padding=0,
            num_documents=None,
            text_bytes=None,
            checksum=f"content {number}",
        )
        self.folder = None

    def read(self, rows):
        return Batch(torch.tensor([[self.number, row] for row in rows]).view(-1, 2), [[2] for _ in rows])


def mixed(lengths, *segments):
    readers = [Numbered(i, length) for i, length in enumerate(lengths)]
    return MixedReader(readers, [Segment(first, parts) for first, parts in segments])


def rows_at(reader, seed, start, count):
    """(stream, row) at each position."""
    return [tuple(row) for row in reader.read(reader.order(seed, start, count)).ids.tolist()]


@st.composite
def mixes(draw):
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    parts = st.tuples(*[st.integers(0, 7)] * len(lengths)).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 150), max_size=3)))
    return mixed(lengths, *[(start, draw(parts)) for start in [0, *starts]])


@given(mixes(), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 60), max_size=8))
@settings(deadline=None)
def test_every_stream_goes_through_its_own_permutations_whatever_is_asked_for(reader, seed, counts):
    whole = rows_at(reader, seed, 0, sum(counts))
    for number, own in enumerate(reader._readers):
        found = [row for stream, row in whole if stream == number]
        assert found == row_order(stream_seed(seed, number), len(own), 0, len(found)).tolist()
    position, pieces = 0, []
    for count in counts:
        pieces += rows_at(reader, seed, position, count)
        position += count
        used = [sum(stream == number for stream, _ in whole[:position]) for number in range(len(reader._readers))]
        assert reader.used(position).tolist() == used
    assert pieces == whole


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(1, 5))
def test_proportions_are_exact_in_each_cycle_and_near_everywhere(parts, cycles):
    reader = mixed([7] * len(parts), (0, tuple(parts)))
    length = sum(parts)
    assert reader.used(cycles * length).tolist() == [cycles * part for part in parts]
    for position in range(length):
        ideal = position * np.array(parts) / length
        assert np.abs(reader.used(position) - ideal).max() <= max(1, len(parts) / 2)


def test_weights_become_the_smallest_whole_numbers():
    assert cycle_parts([0.7, 0.3]) == (7, 3)
    assert cycle_parts([0.65, 0.25, 0.1]) == (13, 5, 2)
    assert cycle_parts([3, 0, 6]) == (1, 0, 2)
    assert cycle_parts([1 / 3, 2 / 3, 1.0013e-3]) == (333, 666, 1)  # 3330, 6660 and 10 of 10,000 by largest remainder


def test_the_order_of_a_mix_is_the_same_on_every_machine_and_version():
    reader = mixed([10, 4], (0, (2, 1)), (6, (0, 1)))
    assert rows_at(reader, 7, 0, 9) == [
        *[(0, row) for row in row_order(7, 10, 0, 1)],
        *rows_at(reader, 7, 1, 8),
    ]
    assert [stream for stream, _ in rows_at(reader, 7, 0, 9)] == [0, 1, 0, 0, 1, 0, 1, 1, 1]
    assert stream_seed(7, 1) == 6635463128224577688
    assert [row for stream, row in rows_at(reader, 7, 0, 9) if stream] == [3, 0, 2, 1, 1]


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory, raw_data_set):
    """The second is of other text and length, by the tokenizer of the first."""
    from data_pipeline.prepare import prepare

    folder = tmp_path_factory.mktemp("second")
    source = write_texts(folder / "text", [text.upper() for text in texts(90)])
    prepare(config(source, folder / "data", tokenizer={"file": str(raw_data_set / "tokenizer.json")}))
    return raw_data_set, folder / "data"


def mix(two_data_sets, first=0.7, second=0.3, **changes):
    streams = [
        {"name": name, "path": str(path), "proportion": proportion}
        for name, path, proportion in zip(("words", "shouts"), two_data_sets, (first, second), strict=True)
    ]
    return DataConfig.from_tree({"streams": streams, **changes}, source="test")


def test_streams_of_shards_are_mixed_as_configured(two_data_sets):
    reader = open_training(mix(two_data_sets, {0: 1, 5: 0.5}, {5: 0.5}), **SIZES, rows_per_step=4)
    parts = [ShardReader(path / "train") for path in two_data_sets]
    assert len(parts[0]) != len(parts[1])
    stream = BatchStream(reader, seed=3, rows_per_step=4, prefetch_threads=2)
    steps = [stream.next() for _ in range(8)]
    stream.close()
    want = parts[0].read(row_order(3, len(parts[0]), 0, 20))
    assert torch.equal(torch.cat([step.ids for step in steps[:5]]), want.ids)
    assert [lengths for step in steps[:5] for lengths in step.lengths] == want.lengths
    later = torch.cat([step.ids for step in steps[5:]])
    assert torch.equal(later[0::2], parts[0].read(row_order(3, len(parts[0]), 20, 6)).ids)
    assert torch.equal(later[1::2], parts[1].read(row_order(stream_seed(3, 1), len(parts[1]), 0, 6)).ids)


def test_the_future_of_a_mix_may_change_and_its_past_may_not(two_data_sets):
    def opened(*proportions, paths=two_data_sets):
        return open_training(mix(paths, *proportions), **SIZES, rows_per_step=4)

    before = opened({0: 0.7, 10: 0.5}, {0: 0.3, 10: 0.5})
    state = BatchStream(before, seed=1, rows_per_step=4).state(position=12 * 4)
    for same in [before, opened({0: 7, 10: 2}, {0: 3, 10: 2}), opened({0: 7, 10: 1, 12: 0}, {0: 3, 10: 1})]:
        assert resume_row(state, same, seed=1) == 48
    swapped = tuple(reversed(two_data_sets))
    for other in [opened(), opened({0: 0.7, 11: 0.5}, {0: 0.3, 11: 0.5}), opened({0: 7, 10: 2}, {0: 3, 10: 3})]:
        with pytest.raises(UserError, match="before row 48 of the run are not those"):
            resume_row(state, other, seed=1)
    with pytest.raises(UserError, match="before row 48 of the run are not those"):
        resume_row(state, opened({0: 0.7, 10: 0.5}, {0: 0.3, 10: 0.5}, paths=swapped), seed=1)


def test_a_run_on_one_data_set_goes_on_with_a_second(two_data_sets):
    alone = open_training(DataConfig(path=str(two_data_sets[0])), **SIZES, rows_per_step=4)
    state = BatchStream(alone, seed=1, rows_per_step=4).state(position=20)
    reader = open_training(mix(two_data_sets, 1, {5: 1}), **SIZES, rows_per_step=4)
    assert resume_row(state, reader, seed=1) == 20
    assert reader.order(1, 0, 20).tolist() == alone.order(1, 0, 20).tolist()
    with pytest.raises(UserError, match="before row 20 of the run are not those"):
        resume_row(state, open_training(mix(two_data_sets, 1, {4: 1}), **SIZES, rows_per_step=4), seed=1)


def test_validation_and_tokenizer_of_a_mix(two_data_sets):
    found = open_validation(mix(two_data_sets), **SIZES)
    assert {name: reader.folder for name, reader in found.items()} == {
        "words": two_data_sets[0] / "validation",
        "shouts": two_data_sets[1] / "validation",
    }
    assert open_tokenizer(mix(two_data_sets)).vocab_size == VOCAB_SIZE


def test_streams_of_different_tokenizers_are_an_error(two_data_sets, tmp_path):
    other = make_data_set(tmp_path, num_documents=100)
    with pytest.raises(UserError, match=r"the stream shouts \(.*\) is of another tokenizer than the stream words"):
        open_training(mix((two_data_sets[0], other)), **SIZES, rows_per_step=4)
    damaged = shutil.copytree(two_data_sets[1], tmp_path / "copy")
    train_bpe(texts(100), VOCAB_SIZE).save(damaged / "tokenizer.json")
    with pytest.raises(UserError, match=r"of another tokenizer than .*copy/tokenizer\.json"):
        open_training(mix((two_data_sets[0], damaged)), **SIZES, rows_per_step=4)


@pytest.mark.parametrize(
    "tree, words",
    [
        ({}, "one of path and streams is needed"),
        ({"path": "x", "streams": [{"name": "a", "path": "a", "proportion": 1}]}, "path=x, .* have no meaning"),
        ({"streams": [{"name": "a", "path": "a", "proportion": 1}] * 2}, "two entries of name=a"),
        ({"streams": [{"name": "a", "path": "a", "proportion": 0}]}, "are 0 from step 0 on"),
        ({"streams": [{"name": "a", "path": "a", "proportion": {0: 1, 9: 0}}]}, "are 0 from step 9 on"),
        ({"streams": [{"name": "a", "path": "a", "proportion": {3: 1}}]}, "are 0 from step 0 on"),
        (
            {"streams": [{"name": "a", "path": "a", "proportion": "half"}]},
            "streams.0.proportion = 'half' .* a valid number",
        ),
        (
            {"streams": [{"name": "a", "path": "a", "proportion": {3: "x"}}]},
            "streams.0.proportion.3 = 'x' .* a valid number",
        ),
        ({"streams": [{"name": "a", "path": "a", "proportion": -1}]}, "greater than or equal to 0"),
    ],
)
def test_streams_that_make_no_sense_are_errors(tree, words):
    with pytest.raises(UserError, match=words):
        DataConfig.from_tree(tree, source="test")


def test_a_proportion_too_small_to_keep_is_an_error(two_data_sets):
    with pytest.raises(UserError, match="proportion=1e-06 of the stream shouts is less than one row in 10000"):
        open_training(mix(two_data_sets, 1, 1e-6), **SIZES, rows_per_step=4)


def test_a_mix_survives_yaml(two_data_sets, tmp_path):
    config = mix(two_data_sets, {0: 1, 5: 0.5}, 0.5)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert DataConfig.load(tmp_path / "run.yaml") == config
    assert json.loads(config.model_dump_json())["streams"][1]["proportion"] == 0.5
