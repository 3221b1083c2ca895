"""When a run saves, and what a save that fails means."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.saver import Saver
from lfm.errors import UserError
from lfm.files import refusing
from lfm.talk import complain
from lfm.training.start import SAVING_SECONDS, Started
from lfm.training.state import TrainState


class Saves:
    """Saves a state, in the background or at once.

    A save that fails is complained of, and made again with the next; only the last of a run raises.  Every method is
    called on every process, in the same order.
    """

    def __init__(self, state: TrainState, start: Started, bar: tqdm) -> None:
        """`bar` says when a save is begun.  As a context, waits for the save under way, however it ends."""
        self.state, self.watch, self.bar = state, start.watch, bar
        settings = state.run.checkpoint
        self.saver = Saver(
            state.run.folder / "checkpoints",
            keep=settings.keep,
            asynchronous=settings.asynchronous,
            group=start.saver_group,
        )
        self.lost = False
        """Whether the last save failed: the run then ends with one."""
        self.stalls: list[float] = []
        """Seconds that each save since the last record held training."""
        self._best_step = -1
        self._best = state.progress.best_validation
        """Held-out loss of the best checkpoint that is whole."""
        self._begun: float | None = None
        """That of the save under way, where it is to be the best."""

    def __enter__(self) -> "Saves":
        self.saver.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.saver.__exit__(*error)

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has, as far as this process knows; all `settle` together."""
        return self.saver.has_failed

    def save(self, *, last: bool = False) -> None:
        """Save the state, unless that is done; `last`: there is no next save, so that a failure raises UserError."""
        self.settle()
        state = self.state
        if state.saved_step == state.progress.step:
            return
        self.bar.set_postfix_str("saving")
        self.watch.phase("saving", allow_seconds=SAVING_SECONDS)
        start = time.perf_counter()
        state.saved_step, self.lost = state.progress.step, False
        best = self._best_step == state.progress.step
        self._begun = state.progress.best_validation if best else None
        try:
            state.save(self.saver, best=best)
        except UserError as error:
            if last:
                raise
            self._give_up(error)
        self.stalls.append(time.perf_counter() - start)

    def save_best(self) -> None:
        """Save the state as the best so far."""
        self._best_step = self.state.progress.step
        self.save()

    def settle(self) -> None:
        """Wait for the save under way."""
        try:
            self.saver.wait()
        except UserError as error:
            self._give_up(error)
        if self._begun is not None:
            self._best, self._begun = self._begun, None

    def _give_up(self, error: UserError) -> None:
        self.state.saved_step, self.lost = -1, True
        # What was to be the best is not kept: the next state that is better than the best that is kept will be.
        if self._begun is not None and self.state.progress.best_validation == self._begun:
            self.state.progress.best_validation = self._best
        self._begun = None
        if self.state.ranks.is_main:
            complain(f"{error}; the next save tries again")

    @contextmanager
    def before_damage_ends_the_run(self) -> Iterator[None]:
        """Data that is damaged or gone ends the run; the steps already made are saved first."""
        try:
            yield
        except (UserError, OSError):
            self.save()
            self.settle()
            raise

    def finish(self, *, wanted: bool) -> None:
        """The end of a run: save if that is wanted, or was not possible before.  Raises UserError when it fails."""
        self.settle()
        if wanted or self.lost:
            self.save(last=True)
        self.watch.phase("finishing the last save", allow_seconds=SAVING_SECONDS)
        self.saver.wait()

    def rewind(self, path: Path, *, skip_rows: int = 0) -> None:
        """`TrainState.rewind`, between two saves; later checkpoints are renamed as those of a branch that was left."""
        self.settle()
        self.watch.phase("going back to a checkpoint", allow_seconds=SAVING_SECONDS)
        self.state.rewind(path, skip_rows=skip_rows)
        self.lost, self._best_step, self.saver.spared = False, -1, None
        self._best, self._begun = self.state.progress.best_validation, None
        if self.state.ranks.is_main:
            with refusing("make the folder writable"):
                checkpoint.set_newer_aside(self.saver.folder, self.state.progress.step)
