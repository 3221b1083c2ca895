"""An optimizer step has the same rows whatever reads them: ranks, threads, nodes, micro-batches and interruptions."""

import itertools
import os
import random
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist

from lfm.data.mix import MixedReader, Segment
from lfm.data.reader import ShardReader
from lfm.data.stream import BatchStream, resume_row
from tests.ranks import run_on_ranks

ROWS_PER_STEP, SEED = 8, 11


def readers(data, kind, cache=None):
    """One data set, or two mixed in proportions that change; of their own copy on another node."""
    train, validation = (
        ShardReader(data / split) if cache is None else ShardReader(cache / split, remote=str(data / split))
        for split in ("train", "validation")
    )
    if kind == "one":
        return train
    change = 3 * ROWS_PER_STEP
    return MixedReader([train, validation], [Segment(0, (3, 2)), Segment(change, (1, 1))])


def steps_of(reader):
    """Two whole epochs and a part of the third, of the first stream."""
    return 2 * len(reader) // ROWS_PER_STEP + 4


def stops_in(reader):
    """Random steps in epochs 0, 1 and 2."""
    chance, epoch = random.Random(0), len(reader) // ROWS_PER_STEP
    return [chance.randrange(1, epoch), epoch + chance.randrange(1, epoch), 2 * epoch + chance.randrange(1, 4)]


def consumed(reader, steps, *, rank, world, threads, micro_batch, stops):
    """Of each step this rank's rows, cut into micro-batches, as a list of (place in the step, ids, lengths)."""
    share = ROWS_PER_STEP // world
    found, state = [], None
    for first, last in itertools.pairwise([0, *stops, steps]):
        stream = BatchStream(
            reader,
            seed=SEED,
            rows_per_step=ROWS_PER_STEP,
            start_row=0 if state is None else resume_row(state, reader, seed=SEED),
            take=slice(rank * share, (rank + 1) * share),
            prefetch_threads=threads,
        )
        for _ in range(first, last):
            batch = stream.next()
            pieces = range(0, share, micro_batch)
            found.append([(rank * share + i, batch[i : i + micro_batch]) for i in pieces])
        state = stream.state()
        stream.close()
    return found


def reference(data, kind):
    """The digest of each step, and all of its rows, read one by one."""
    reader = readers(data, kind)
    rows = [reader.read(reader.order(SEED, step * ROWS_PER_STEP, ROWS_PER_STEP)) for step in range(steps_of(reader))]
    return rows, [step.digest() for step in rows]


PRODUCT = list(itertools.product((1, 2, 4), (0, 1, 2), (1, 2), ("one", "mixed")))


@pytest.mark.parametrize("kind", ["one", "mixed"])
@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_step_has_the_same_rows(world, threads, kind, raw_data_set):
    wanted, _ = reference(raw_data_set, kind)
    reader = readers(raw_data_set, kind)
    for micro_batch, stops in itertools.product((1, 2), ([], stops_in(reader))):
        ranks = [
            consumed(
                reader,
                len(wanted),
                rank=rank,
                world=world,
                threads=threads,
                micro_batch=micro_batch,
                stops=stops,
            )
            for rank in range(world)
        ]
        for step, batch in enumerate(wanted):
            pieces = sorted((piece for rank in ranks for piece in rank[step]), key=lambda piece: piece[0])
            assert [place for place, _ in pieces] == list(range(0, ROWS_PER_STEP, micro_batch))
            assert torch.equal(torch.cat([part.ids for _, part in pieces]), batch.ids), f"step {step}"
            assert [row for _, part in pieces for row in part.lengths] == batch.lengths


def digests_on_a_rank(rank, data, kind, folder, *, nodes, threads, micro_batch, stopping):
    """The digest of each step over all ranks; each node has a temporary folder and a cache of its own."""
    world = dist.get_world_size()
    node = folder / f"node {rank * nodes // world}"
    (node / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(node / "tmp")
    reader = readers(data, kind, cache=node / "cache")
    steps = consumed(
        reader,
        steps_of(reader),
        rank=rank,
        world=world,
        threads=threads,
        micro_batch=micro_batch,
        stops=stops_in(reader) if stopping else [],
    )
    own = [sum(batch.digest(first=place) for place, batch in step) for step in steps]
    # As 32-bit halves, whose sum over ranks cannot overflow.
    halves = torch.tensor([[digest % 2**64 >> 32, digest % 2**32] for digest in own])
    dist.all_reduce(halves)
    left_over = [path.name for path in node.rglob("*.tmp*")] + os.listdir(node / "tmp")
    return [((high << 32) + low) % 2**64 for high, low in halves.tolist()], left_over


def check_on_real_ranks(data, folder, world, threads, nodes, kind, micro_batch, stopping):
    data = shutil.copytree(data, folder / "data")  # reading unpacks shards, which other tests expect packed
    _, wanted = reference(data, kind)
    options = {"nodes": nodes, "threads": threads, "micro_batch": micro_batch, "stopping": stopping}
    for found, left_over in run_on_ranks(_call, world, data, kind, folder, options):
        assert found == wanted
        assert not left_over


def _call(rank, data, kind, folder, options):
    return digests_on_a_rank(rank, data, kind, folder, **options)


@pytest.mark.parametrize(
    "world, threads, nodes, kind, micro_batch, stopping",
    [(2, 0, 1, "one", 2, True), (2, 2, 2, "mixed", 1, True), (4, 1, 2, "mixed", 2, True)],
)
def test_real_ranks_and_nodes_have_the_same_steps(
    world, threads, nodes, kind, micro_batch, stopping, zstd_data_set, tmp_path
):
    check_on_real_ranks(zstd_data_set, tmp_path, world, threads, nodes, kind, micro_batch, stopping)


@pytest.mark.slow
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("world, threads, nodes, kind", [each for each in PRODUCT if each[2] <= each[0]])
def test_all_ranks_and_nodes_have_the_same_steps(
    world, threads, nodes, kind, micro_batch, stopping, zstd_data_set, tmp_path
):
    check_on_real_ranks(zstd_data_set, tmp_path, world, threads, nodes, kind, micro_batch, stopping)
