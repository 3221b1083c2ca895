"""What a run saves, and where it starts from."""

from pydantic import model_validator
from typing_extensions import Self

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
    skip_rows: CountOrZero = 0
    """Of resume=PATH: so many of the next rows of the data order are passed over, such as those of a spike."""
    init_from: PathText | None = None
    """Run or checkpoint, or hf://USER/NAME, whose weights alone start this run (continued pre-training); optimizer and
    data start anew."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.skip_rows and self.resume in ("auto", "never"):
            raise ValueError(
                f"skip_rows={self.skip_rows} is of the checkpoint that a run goes back to, and resume={self.resume} "
                "names none; set resume=PATH"
            )
        return self
