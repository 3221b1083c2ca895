"""Which layers a pipeline stage holds where the time of layers is known: the chunks of the fastest simulated step."""

import functools
import itertools
import math
from collections.abc import Iterator

from lfm.layout.balance import balanced_sizes, moves
from lfm.layout.simulate import simulated_time
from lfm.layout.stage_times import StageTimes

_ALL = 3000
"""So many ways to divide the layers are all tried, in a fraction of a second."""
_PASSES = 1_000_000
"""Else as many are simulated, about a microsecond each, before the search ends."""
_ROUNDS = 4
"""Simulated rounds of one micro-batch a stage; further ones of a step take as long as the last."""


def fastest_sizes(
    times: StageTimes, stages: int, chunks_per_stage: int, micro_batches: int, *, keep: int | None
) -> tuple[int, ...]:
    """Layers of each of the `stages * chunks_per_stage` chunks, at least one in each.

    Where there are too many ways to divide them, a local optimum, moving one layer from any chunk to any other makes
    the step no shorter; for dozens of chunks what is found in a second or two.  `keep`: as `simulated_time`.
    """
    num_layers, num_chunks = len(times.layers), stages * chunks_per_stage

    @functools.cache
    def step(sizes: tuple[int, ...]) -> float:
        return step_time(times, sizes, stages, micro_batches, keep=keep)

    if math.comb(num_layers - 1, num_chunks - 1) <= _ALL:
        return min(_partitions(num_layers, num_chunks), key=step)
    sizes = balanced_sizes(times.costs, times.head.total, stages, chunks_per_stage)
    most, improving = _PASSES // (4 * _ROUNDS * stages * num_chunks), True
    while improving:
        best = sizes
        for moved in moves(sizes):
            if step.cache_info().misses > most:
                break
            best = min(best, moved, key=step)
        sizes, improving = best, best != sizes
    return sizes


def step_time(times: StageTimes, sizes: tuple[int, ...], stages: int, micro_batches: int, *, keep: int | None) -> float:
    """Milliseconds of the passes of one step, simulated."""
    chunks = times.chunks(sizes)

    def simulated(micro_batches: int) -> float:
        return simulated_time(chunks, stages, micro_batches, transfer=times.transfer, keep=keep)

    rest = micro_batches / stages - _ROUNDS
    if rest <= 0:
        return simulated(micro_batches)
    found = simulated(_ROUNDS * stages)
    return found + rest * (found - simulated((_ROUNDS - 1) * stages))


def _partitions(num_layers: int, chunks: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_layers), chunks - 1):
        yield tuple(end - start for start, end in zip((0, *cuts), (*cuts, num_layers), strict=True))
