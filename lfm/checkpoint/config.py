"""What a run saves, and where it starts from."""

from lfm.config import Config, Count, CountOrZero, PathText


class CheckpointConfig(Config):
    every_steps: CountOrZero = 1000
    """0: only at the end and on a signal."""
    save_at_end: bool = True
    asynchronous: bool = True
    """Write in the background; costs host memory of one copy of the state; at most one save is under way."""
    keep: Count = 2
    """Newest checkpoints kept; older ones are removed after a newer one is whole."""
    keep_best: bool = False
    """Save after each validation with the lowest loss so far, and keep that checkpoint too: checkpoints/best."""
    resume: PathText = "auto"
    """auto: go on from the run's newest checkpoint, if any; never: refuse a run folder that has one; or a path."""
    init_from: PathText | None = None
    """Run or checkpoint, or hf://USER/NAME, whose weights alone start this run (continued pre-training); optimizer and
    data start anew."""
