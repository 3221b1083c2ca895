"""How fast a run would go on this device: a few of its updates, whose model is then thrown away."""

import statistics

from lfm.data.stream import BatchStream
from lfm.training.run import RunConfig
from lfm.training.start import local_engine
from lfm.training.state import open_data

PLACES = 3
"""Of the whole run at which an update is timed: a family may do more in a later phase of it."""
_MOST_ROUNDS = 100


def seconds_per_step(run: RunConfig, *, limit_seconds: float) -> float:
    """Time of an update of `run` by this process alone: the lower quartile at each of some places in it, their mean.

    Takes `limit_seconds` or a round over all places, whichever is longer, after two updates that are not counted.
    """
    data, steps = open_data(run), run.training.steps
    engine = local_engine(run, run.device)
    stream = BatchStream(data.rows, seed=run.seed, rows_per_step=run.training.global_batch_size)
    places = [steps * (2 * i + 1) // (2 * PLACES) for i in range(PLACES)]

    def update(place: int) -> None:
        engine.start_step(place, steps)
        engine.forward_backward(stream.next())
        engine.step(0.0)

    def timed(place: int) -> float:
        started = engine.synchronize()
        update(place)
        return engine.synchronize() - started

    update(places[0])
    update(places[-1])
    times: list[list[float]] = []
    while not times or (sum(map(sum, times)) < limit_seconds and len(times) < _MOST_ROUNDS):
        times.append([timed(place) for place in places])
    stream.close()
    # The lower quartile: other work on the machine comes in spells, and two threads that wait for each other then take
    # many times as long.
    return statistics.mean(sorted(of_place)[len(of_place) // 4] for of_place in zip(*times, strict=True))
