"""How fast a run would go on this device: a few of its updates, whose model is then thrown away."""

from lfm.data.stream import BatchStream
from lfm.training.run import RunConfig
from lfm.training.start import local_engine
from lfm.training.state import open_data

PLACES = 3
"""Of the whole run at which an update is timed: a family may do more in a later phase of it."""
_MOST_ROUNDS = 20


def seconds_per_step(run: RunConfig, *, limit_seconds: float) -> float:
    """Mean time of an update of `run` by this process alone, at places spread over it.

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

    update(places[0])
    update(places[-1])
    started, seconds, rounds = engine.synchronize(), 0.0, 0
    while rounds == 0 or (seconds < limit_seconds and rounds < _MOST_ROUNDS):
        for place in places:
            update(place)
        seconds, rounds = engine.synchronize() - started, rounds + 1
    stream.close()
    return seconds / rounds / PLACES
