"""How long a pipeline takes, by following its schedule: the order of megatron-core's 1F1B, plain or interleaved."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Pass = tuple[bool, int, int]
"""Whether it is forward, chunk (of the model, first to last), micro-batch."""


class Times(NamedTuple):
    """Of one part of a model and one micro-batch, in one unit."""

    forward: float = 0.0
    inputs: float = 0.0
    """Backward as far as other parts wait for it: gradients of what came in."""
    weights: float = 0.0
    """Gradients of weights, which nothing waits for."""

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights

    def plus(self, other: "Times") -> "Times":
        return Times(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Times":
        return Times(*(factor * a for a in self))


def simulated_time(
    chunks: Sequence[Times], stages: int, micro_batches: int, *, transfer: float = 0.0, keep: int | None = None
) -> float:
    """Of one step, from the first forward pass to the last stage's end; chunk `c` belongs to stage `c % stages`.

    A result reaches the next stage `transfer` after it is made, while both go on.  `keep`: gradients of weights are
    made after those of inputs have left, later by as many backward passes while there are forward passes to come; None:
    with them.
    """
    passes = [deque(schedule(stage, stages, len(chunks) // stages, micro_batches)) for stage in range(stages)]
    forward_left = [len(chunks) // stages * micro_batches] * stages
    ends, clock, waiting = dict[Pass, float](), [0.0] * stages, [deque[float]() for _ in range(stages)]
    while any(passes):
        for stage, todo in enumerate(passes):
            while todo:
                forward, chunk, micro_batch = todo[0]
                source = chunk - 1 if forward else chunk + 1
                if 0 <= source < len(chunks):
                    end = ends.get((forward, source, micro_batch))
                    if end is None:
                        break
                    clock[stage] = max(clock[stage], end + transfer)
                times = chunks[chunk]
                clock[stage] += times.forward if forward else times.inputs
                if not forward and keep is None:
                    clock[stage] += times.weights
                ends[todo.popleft()] = clock[stage]
                forward_left[stage] -= forward
                if not forward and keep is not None:
                    waiting[stage].append(times.weights)
                    while len(waiting[stage]) > (keep if forward_left[stage] else 0):
                        clock[stage] += waiting[stage].popleft()
    return max(clock)


def schedule(stage: int, stages: int, chunks_per_stage: int, micro_batches: int) -> Iterator[Pass]:
    """The passes of one stage in their order; `micro_batches` is a multiple of `stages` where chunks are several."""
    total = chunks_per_stage * micro_batches
    warm_up = stages - stage - 1
    if chunks_per_stage > 1:
        warm_up += stages - stage - 1 + (chunks_per_stage - 1) * stages
    warm_up = min(warm_up, total)

    def at(index: int, forward: bool) -> Pass:
        if chunks_per_stage == 1:
            return forward, stage, index
        # Groups of as many micro-batches as stages go through one chunk after the other.
        group, place = divmod(index, stages * chunks_per_stage)
        chunk, micro_batch = divmod(place, stages)
        if not forward:
            chunk = chunks_per_stage - 1 - chunk
        return forward, chunk * stages + stage, group * stages + micro_batch

    for index in range(warm_up):
        yield at(index, True)
    for index in range(total - warm_up):
        yield at(index + warm_up, True)
        yield at(index, False)
    for index in range(total - warm_up, total):
        yield at(index, False)
