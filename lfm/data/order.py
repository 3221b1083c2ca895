"""Which row of a data set is used when: a function of (seed, position) alone, whatever ranks, workers or batch size."""

from collections.abc import Callable

import numpy as np


def epoch_permutation(seed: int, num_rows: int, epoch: int) -> np.ndarray:
    """All rows, int64 `[num_rows]`, in the order of one epoch."""
    # Sorting raw bits rather than Generator.permutation: numpy promises that the bits of Philox and SeedSequence never
    # change, and promises no such thing of Generator, so the order survives an upgrade of numpy.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_rows)
    permutation = np.argsort(bits, kind="stable").astype(np.int64)
    permutation.setflags(write=False)
    return permutation


def row_order(
    seed: int,
    num_rows: int,
    start: int,
    count: int,
    permutation: Callable[[int, int, int], np.ndarray] = epoch_permutation,
) -> np.ndarray:
    """Rows at the global sample positions `start .. start + count - 1`, as int64 `[count]`.

    Position p belongs to epoch p // num_rows; each epoch is a permutation of all rows drawn from (seed, epoch).  So
    resuming anywhere is asking from there, and a changed batch size continues in the same order.  `permutation` is
    `epoch_permutation` or a cache of it.
    """
    assert num_rows > 0 and start >= 0 and count >= 0, (num_rows, start, count)
    rows = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, offset = divmod(start + done, num_rows)
        piece = permutation(seed, num_rows, epoch)[offset : offset + count - done]
        rows[done : done + len(piece)] = piece
        done += len(piece)
    return rows


def random_order(seed: int, num_rows: int, start: int, count: int) -> np.ndarray:
    """Rows at the same positions, int64 `[count]`, when each position draws its own uniformly and with replacement."""
    assert num_rows > 0 and start >= 0 and count >= 0, (num_rows, start, count)
    # Philox makes four numbers of each value of its counter, so any position is reached without those before it.
    block, skipped = divmod(start, 4)
    bits = np.random.Philox(np.random.SeedSequence(seed), counter=block).random_raw(skipped + count)[skipped:]
    return (bits % np.uint64(num_rows)).astype(np.int64)  # uniform to within num_rows / 2**64
