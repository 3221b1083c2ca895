"""Every way in which a data set was seen to break: what the reader makes of it, on one process and two, and `verify`.

Elsewhere: damaged caches (test_reader.py), files of ids (test_bins.py), ranks that die (tests/parallel, tests/launch).
"""

import json
import resource
import shutil
import time

import pytest
import torch.distributed as dist

from data_pipeline.verify import Verification
from lfm.data.format import INDEX_NAME
from lfm.data.stream import BatchStream, DataConfig, open_training
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.job.ranks import Ranks
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE, texts
from tests.data.damage import cut, fill_with_zeros, flip, remove
from tests.ranks import run_on_ranks

LIMIT_SECONDS = 30


def swap(path):
    """With the next shard that has another content."""
    other = path.with_name(path.name.replace("00002", "00003"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def replace_tokenizer(path):
    train_bpe(texts(100), VOCAB_SIZE).save(path)


def forget_a_shard(path):
    """An index that is valid JSON and lacks its last shard."""
    tree = json.loads(path.read_bytes())
    tree["shards"].pop()
    path.write_bytes(json.dumps(tree).encode())


SHARD = {"raw": "train/shard.00002.mds", "zstd": "train/shard.00002.mds.zstd"}
TABLE = [
    *[(damage, "raw", SHARD["raw"]) for damage in (flip, fill_with_zeros, cut, remove, swap)],
    *[(damage, "zstd", SHARD["zstd"]) for damage in (flip, fill_with_zeros, cut, remove, swap)],
    *[(damage, "raw", f"train/{INDEX_NAME}") for damage in (flip, fill_with_zeros, cut, remove, forget_a_shard)],
    *[(damage, "raw", "tokenizer.json") for damage in (flip, cut, remove, replace_tokenizer)],
]
CASES = [(*row, place) for row in TABLE for place in ("local", "remote")]


def names(error, damage, name):
    """Whether the error names the file; of two that changed places, either."""
    either = (name, name.replace("00002", "00003")) if damage is swap else (name,)
    return any(each.rpartition("/")[2] in error for each in either)


def case_name(value):
    return getattr(value, "__name__", None) or str(value).replace("train/", "")


def read_all(data, place, folder, threads, ranks):
    """An epoch of steps, as a training process reads it."""
    where = {"path": str(folder / "cache"), "remote": str(data)} if place == "remote" else {"path": str(data)}

    def opened():
        return open_training(DataConfig(**where), seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=4)

    reader = ranks.together(opened)
    share = 4 // ranks.world_size
    take = slice(ranks.rank * share, (ranks.rank + 1) * share)
    stream = BatchStream(reader, seed=0, rows_per_step=4, take=take, prefetch_threads=threads)
    try:
        for _ in range(-(-len(reader) // 4)):
            ranks.together(stream.next)
    finally:
        stream.close()


def broken(source, damage, name, folder):
    data = shutil.copytree(source, folder / "data")
    damage(data / name)
    return data


def error_of(data, place, folder, threads, ranks):
    """The error that reading ends with, after how many seconds."""
    start = time.monotonic()
    try:
        read_all(data, place, folder, threads, ranks)
    except UserError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("damage, kind, name, place", CASES, ids=case_name)
def test_one_process_ends_with_an_error_that_names_the_file(damage, kind, name, place, threads, request, tmp_path):
    data = broken(request.getfixturevalue(f"{kind}_data_set"), damage, name, tmp_path)
    error, seconds = error_of(data, place, tmp_path, threads, Ranks())
    assert names(error, damage, name) and seconds < LIMIT_SECONDS


def all_cases(rank, folder, threads):
    ranks = Ranks(rank, dist.get_world_size(), dist.group.WORLD)
    found = []
    for number, (_, _, _, place) in enumerate(CASES):
        data = folder / str(number)
        found.append(error_of(data / "data", place, data / f"{threads} threads", threads, ranks))
    return found


def test_two_ranks_end_with_the_same_error_that_names_the_file(raw_data_set, zstd_data_set, tmp_path):
    sources = {"raw": raw_data_set, "zstd": zstd_data_set}
    for number, (damage, kind, name, _) in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        broken(sources[kind], damage, name, tmp_path / str(number))
    for threads in (0, 2):
        for errors in zip(*run_on_ranks(all_cases, 2, tmp_path, threads), CASES, strict=True):
            (first, seconds), (second, _), (damage, _, name, place) = errors
            assert first == second, (damage, name, place)
            assert names(first, damage, name) and seconds < LIMIT_SECONDS, (damage, name, place, first)


@pytest.mark.parametrize("damage, kind, name", TABLE, ids=case_name)
def test_verify_names_the_file(damage, kind, name, request, tmp_path):
    data = broken(request.getfixturevalue(f"{kind}_data_set"), damage, name, tmp_path)
    for source in (str(data), f"file://{data}"):
        problems = Verification(source, full=True).run().problems
        assert any(name.rpartition("/")[2] in problem for problem in problems), problems


def read_on_a_full_disk(rank, data, folder, threads):
    """Once the data set is open, no file of this process may grow past 3000 bytes: less than a shard needs."""
    opened = DataConfig(path=str(folder / "cache"), remote=str(data))
    reader = open_training(opened, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    stream = BatchStream(reader, seed=0, rows_per_step=4, prefetch_threads=threads)
    ranks = Ranks(rank, dist.get_world_size(), dist.group.WORLD)
    with pytest.raises(UserError) as caught:
        for _ in range(len(reader) // 4):
            ranks.together(stream.next)
    stream.close()
    left_over = [path.name for path in (folder / "cache").rglob("*.tmp*")]
    return str(caught.value), left_over


@pytest.mark.parametrize("threads", [0, 2])
def test_a_full_disk_under_the_cache_is_an_error_that_names_the_file(threads, raw_data_set, tmp_path):
    found = run_on_ranks(read_on_a_full_disk, 2, raw_data_set, tmp_path, threads)
    for error, left_over in found:
        assert error == found[0][0] and not left_over
        assert "shard.000" in error and "no space left in" in error
