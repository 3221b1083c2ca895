"""Which layers a pipeline stage holds: contiguous chunks of the model whose most loaded stage has the least to do.

`costs` are of the layers, first to last; `head` is the cost of the output projection, which the last chunk carries.
Chunk `c` of a pipeline of `stages` belongs to stage `c % stages`.
"""

from collections.abc import Iterator, Sequence


def stage_loads(costs: Sequence[float], head: float, sizes: Sequence[int], stages: int) -> list[float]:
    """Cost of every stage when the chunks have these numbers of layers."""
    loads, first = [0.0] * stages, 0
    for chunk, size in enumerate(sizes):
        loads[chunk % stages] += sum(costs[first : first + size])
        first += size
    loads[(len(sizes) - 1) % stages] += head
    return loads


def balance(loads: Sequence[float]) -> float:
    """Share of the stages' time that is work, as far as their loads decide it: mean over maximum."""
    return sum(loads) / (len(loads) * max(loads))


def balanced_sizes(costs: Sequence[float], head: float, stages: int, chunks_per_stage: int) -> tuple[int, ...]:
    """Layers of each of the `stages * chunks_per_stage` chunks, at least one in each.

    The largest load is the least possible with one chunk a stage.  With several it is a local optimum: moving
    one layer from any chunk to any other lowers it no further.
    """
    sizes = _least_largest_chunk(costs, head, stages * chunks_per_stage)

    def heaviest_first(sizes: tuple[int, ...]) -> list[float]:
        return sorted(stage_loads(costs, head, sizes, stages), reverse=True)

    loads, improving = heaviest_first(sizes), chunks_per_stage > 1
    while improving:
        improving = False
        for moved in moves(sizes):
            if heaviest_first(moved) < loads:
                sizes, loads, improving = moved, heaviest_first(moved), True
                break
    return sizes


def _least_largest_chunk(costs: Sequence[float], head: float, chunks: int) -> tuple[int, ...]:
    """Sizes with the least possible largest chunk; dynamic programming over (chunks used, layers used)."""
    # best[n]: the least largest load of the chunks so far when they hold the first n layers, and their sizes.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for chunk in range(chunks):
        extra = head if chunk == chunks - 1 else 0.0
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (largest, sizes) in best.items():
            load = extra
            for end in range(used + 1, len(costs) - (chunks - 1 - chunk) + 1):
                load += costs[end - 1]
                found = (max(largest, load), (*sizes, end - used))
                longer[end] = min(found, longer.get(end, found))
        best = longer
    return best[len(costs)][1]


def moves(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every way to take one layer from a chunk that has more than one and give it to another."""
    for source in range(len(sizes)):
        for target in range(len(sizes)):
            if source != target and sizes[source] > 1:
                yield tuple(size - (chunk == source) + (chunk == target) for chunk, size in enumerate(sizes))
