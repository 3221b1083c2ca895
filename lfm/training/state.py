"""Where a run stands, whole: what a checkpoint holds of it, and the records that must agree with that."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.matching import check_architecture, check_layers, check_optimizer
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import load_tensors, not_finite
from lfm.config import dotted
from lfm.data.consumed import START, Consumed, ConsumedRecord, chained
from lfm.data.reader import RowReader
from lfm.data.stream import BatchStream, open_tokenizer, open_training, open_validation, resume_row
from lfm.data.tokenizer import Tokenizer
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.tasks import open_tasks
from lfm.export.hub import located
from lfm.files import expanded, refusing
from lfm.inference.sampling import check_prompts
from lfm.job.ranks import Ranks
from lfm.talk import complain, say
from lfm.training.engine import Engine, Read, StepResult
from lfm.training.metrics import Metrics, Speed
from lfm.training.run import RunConfig

if TYPE_CHECKING:
    from lfm.evaluation.harness import Tasks


@dataclass(frozen=True)
class Skip:
    """Rows of the data order that were passed over after a step."""

    step: int
    rows: int


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    best_validation: float = math.inf
    validations_without_gain: int = 0
    chain: str = START
    """Of the digests of all steps so far: what they consumed."""
    skips: list[Skip] = field(default_factory=list)

    def stored(self) -> dict[str, Any]:
        """As JSON values."""
        best = self.best_validation if math.isfinite(self.best_validation) else None
        return asdict(self) | {"best_validation": best}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Progress":
        """Of `stored()`."""
        best, skips = stored["best_validation"], [Skip(**skip) for skip in stored.get("skips", [])]
        return cls(**{**stored, "best_validation": math.inf if best is None else best, "skips": skips})


@dataclass(frozen=True)
class Checkpoint:
    """One whose files this run's processes have verified."""

    path: Path
    manifest: dict[str, Any]

    def reader(self, ranks: Ranks, model: Mapping[str, Any]) -> Read:
        """Fills tensors of an engine of this `model` from it; rank 0 says what it lacks, and what of it is left out,
        because routers were balanced otherwise."""

        def read(targets: Mapping[str, Tensor]) -> None:
            kept, wanted = (balance_of(tree) for tree in (self.manifest["config"]["model"], model))
            left = _left_out(kept, wanted)
            if left is not None and ranks.is_main:
                say(f"routers choose without {left[0]} of {self.path} from here on: {left[1]} keeps it")
            lacking = load_tensors(self.path, self.manifest, targets, may_lack="moving" if kept != wanted else None)
            if lacking and ranks.is_main:
                more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
                say(
                    f"the balance of the routers starts afresh: {self.path} has no {lacking[0]}{more}, because its "
                    "model.ffn.balance is another"
                )

        return read


def _left_out(kept: tuple[Any, ...] | None, wanted: tuple[Any, ...] | None) -> tuple[str, str] | None:
    """What a checkpoint's routers chose by that the run's do not, and the key that keeps it."""
    if kept is None or wanted is None or kept[0] != "bias":
        return None
    if wanted[0] != "bias":
        return "the bias", "model.ffn.balance.kind=bias"
    return ("the mean logits", "model.ffn.balance.mean_decay") if kept[2] and not wanted[2] else None


def balance_of(model: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What decides which tensors the balance of a model's routers keeps; None without routers."""
    ffn = model.get("ffn") or {}
    balance = ffn.get("balance")
    if balance is None:
        return None
    return balance["kind"], balance["scope"] == "step", balance.get("mean_decay") is not None


@dataclass(frozen=True)
class RunData:
    """What a run reads besides checkpoints."""

    rows: RowReader
    held_out: dict[str, RowReader]
    """The validation split of each stream by its name."""
    tokenizer: Tokenizer
    prompts: list[list[int]]
    """Of samples, as ids."""
    tasks: "Tasks | None" = None


@dataclass
class TrainState:
    """A run between two steps.  Every process of it has one and calls the same methods in the same order."""

    run: RunConfig
    ranks: Ranks
    data: RunData
    engine: Engine
    stream: BatchStream
    speed: Speed
    progress: Progress = field(default_factory=Progress)
    position: int = 0
    """Rows of the data order behind the last update: a batch that was read, and not used, is not."""
    saved_step: int = -1
    """Of the checkpoint that was made or restored last; -1: none is."""
    losses: list[float] = field(default_factory=list)
    """Cross entropies of the steps since the last record."""
    consumed: ConsumedRecord | None = None
    metrics: Metrics | None = None
    """Records are rank 0's."""

    @property
    def tokens_per_step(self) -> int:
        return self.run.training.global_batch_size * self.run.model.seq_length

    def advance(self, result: StepResult) -> None:
        """Count an update, made from what the stream handed out last."""
        progress = self.progress
        self.position = self.stream.position
        progress.step += 1
        progress.tokens += self.tokens_per_step
        progress.chain = chained(progress.chain, progress.step, result.digest)
        if self.consumed is not None:
            self.consumed.add(Consumed(progress.step, result.digest, progress.chain))
        self.speed.add(self.tokens_per_step, result.attended_pairs)
        self.losses.append(result.terms["cross_entropy"])

    def save(self, saver: Saver, *, best: bool = False) -> None:
        """Hand everything to `saver`, once the save before is made; `best`: the link to the best checkpoint moves.

        Raises NonFiniteError for a state with a number that is not finite, and what `Saver.save` raises.
        """
        manifest = {
            "config": self.run.model_dump(mode="json"),
            "progress": self.progress.stored(),
            "counters": self.engine.state_values(),
            "data": self.stream.state(self.position),
        }
        if self.consumed is not None:
            self.consumed.sync()
        if self.metrics is not None:
            self.metrics.sync()
        share, owned = self.engine.state_tensors(), self.engine.state_tensors_are_fresh
        check_finite(share, self.run, self.progress.step, self.ranks)
        saver.save(self.progress.step, share, manifest, self.data.tokenizer.definition, owned=owned, best=best)

    def restore(self, found: Checkpoint, *, skip_rows: int = 0) -> None:
        """Engine, progress and place in the data as they were saved, but for `skip_rows` rows that are passed over.

        Raises UserError for a checkpoint of others.
        """
        manifest = found.manifest
        self.engine.load_state_tensors(found.reader(self.ranks, self.run.model.model_dump(mode="json")))
        self.engine.load_state_values(manifest["counters"])
        self.progress = Progress.of(manifest["progress"])
        self.position = resume_row(manifest["data"], self.data.rows, seed=self.run.seed)
        if skip_rows > 0:
            self.progress.skips.append(Skip(self.progress.step, skip_rows))
            self.position += skip_rows
        self.stream.seek(self.position)
        self.saved_step = self.progress.step

    def rewind(self, path: Path, *, skip_rows: int = 0) -> None:
        """Go back to an earlier checkpoint of this run as if the steps since had never been; all processes at once.

        The next `skip_rows` rows of the data order are then passed over; proportions of streams are by place in that
        order, so they change as many rows earlier.  The next checkpoint knows of it, and a run that ends before goes on
        without.  Raises UserError for a checkpoint that is damaged.
        """
        found = verified(path, self.run, self.ranks)
        assert found.manifest["step"] <= self.progress.step, (path, self.progress.step)
        self.restore(found, skip_rows=skip_rows)
        self.losses.clear()
        self.stream.wait_seconds = 0.0
        self.speed.restart()
        if self.consumed is not None:
            self.consumed.truncate(self.progress.step, chain=self.progress.chain)
        if self.metrics is not None:
            self.metrics.truncate(self.progress.step)


def open_data(run: RunConfig) -> RunData:
    """Raises UserError for data that do not fit the model, prompts that do not fit its context, and unknown tasks."""
    sizes = {"seq_length": run.model.seq_length, "vocab_size": run.model.vocab_size}
    rows = open_training(run.data, **sizes, rows_per_step=run.training.global_batch_size)
    held_out = open_validation(run.data, **sizes)
    tokenizer = open_tokenizer(run.data)
    try:
        prompts = [tokenizer.encode_prompt(prompt) for prompt in run.samples.prompts]
        check_prompts(prompts, run.model.context_limit)
    except UserError as error:
        raise UserError(f"samples.prompts: {error}") from None
    tasks = None
    if run.evaluation.tasks:
        tasks = open_tasks(run.evaluation.tasks, [expanded(path) for path in run.evaluation.include_path])
    return RunData(rows, held_out, tokenizer, prompts, tasks)


def make_state(
    run: RunConfig, ranks: Ranks, data: RunData, engine: Engine, start: Checkpoint | None, weights: Checkpoint | None
) -> TrainState:
    """The state of `start`; else a fresh one, with the weights alone of `weights` if that is given."""
    stream = BatchStream(
        data.rows,
        seed=run.seed,
        rows_per_step=run.training.global_batch_size,
        take=engine.rows_of_step(run.training.global_batch_size),
        prefetch_threads=run.data.prefetch_threads,
        prefetch_steps=run.data.prefetch_steps,
    )
    state = TrainState(run, ranks, data, engine, stream, Speed(run.model, engine, ranks.world_size))
    if start is not None:
        state.restore(start, skip_rows=run.checkpoint.skip_rows)
        if ranks.is_main:
            skipped = f", {run.checkpoint.skip_rows:,} rows passed over" if run.checkpoint.skip_rows else ""
            say(f"resuming from {start.path} at step {state.progress.step}{skipped}")
            if changes := changed_keys(start.manifest["config"], run.model_dump(mode="json")):
                complain(f"this run goes on with other keys than before: {', '.join(changes)}")
    elif weights is not None:
        reader = weights.reader(ranks, run.model.model_dump(mode="json"))
        engine.load_state_tensors(reader, kinds=("master", "moving", "frozen"))
        if ranks.is_main:
            say(f"starting from the weights of {weights.path}")
    if ranks.is_main:
        step, chain, config = state.progress.step, state.progress.chain, run.model_dump(mode="json")
        state.metrics = Metrics(run.logging, run.folder, name=run.folder.name, resumed_step=step, run_config=config)
        state.consumed = ConsumedRecord(run.folder, resumed_step=step, chain=chain)
    state.speed.restart()
    return state


_NOT_OF_THE_RESULT = (
    "name",
    "output",
    "checkpoint.",
    "logging.",
    "samples.",
    "evaluation.",
    "parallel.",
    "training.steps",
)
"""What begins with these does not change what is learnt, or is more of it."""


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key before -> now` of those that both have, but for those of no result, the layout and more steps."""
    old = dict(dotted(before))
    return [
        f"{key} {old[key]} -> {value}"
        for key, value in dotted(now)
        if key in old and old[key] != value and not key.startswith(_NOT_OF_THE_RESULT)
    ]


def starting_point(run: RunConfig, rows: RowReader, ranks: Ranks) -> Checkpoint | None:
    """The verified checkpoint to go on from; None for a fresh start.  Raises UserError."""
    path = ranks.from_main(lambda: _checkpoint_to_resume(run))
    if path is None:
        return None
    found = verified(path, run, ranks)
    check_optimizer(path, found.manifest, run.optimizer.kind)
    resume_row(found.manifest["data"], rows, seed=run.seed)
    step = found.manifest["progress"]["step"]
    if ranks.is_main:
        with refusing("make the folder writable"):
            checkpoint.set_newer_aside(run.folder / "checkpoints", step)
        if step >= run.training.steps:
            say(f"step {step} is reached already: raise training.steps={run.training.steps} to train on")
    return found


def _checkpoint_to_resume(run: RunConfig) -> Path | None:
    folder, wanted = run.folder / "checkpoints", run.checkpoint.resume
    checkpoint.remove_unfinished(folder)
    existing = checkpoint.whole_checkpoints(folder)
    if wanted == "never" and existing:
        raise UserError(f"checkpoint.resume=never, but {run.folder} holds {existing[-1].name}; give another name=NAME")
    if wanted == "never" or (wanted == "auto" and not existing):
        return None
    if wanted == "auto":
        return existing[-1]
    try:
        return checkpoint.find(located(wanted))
    except UserError as error:
        raise UserError(f"checkpoint.resume={wanted}: {error}; or set it to auto or never") from None


def starting_weights(run: RunConfig, ranks: Ranks) -> Checkpoint | None:
    """The verified checkpoint of `checkpoint.init_from`, if that is set.  Raises UserError."""
    if run.checkpoint.init_from is None:
        return None
    way_out = "leave checkpoint.init_from out"
    return verified(checkpoint.find(located(run.checkpoint.init_from)), run, ranks, way_out=way_out)


def verified(path: Path, run: RunConfig, ranks: Ranks, *, way_out: str = "start a new run (name=NAME)") -> Checkpoint:
    """The checkpoint, of which each process has verified its part of the files.  Raises UserError."""
    manifest = read_manifest(path, warn=ranks.is_main)
    check_architecture(path, manifest, run.model, way_out=way_out)
    check_layers(path, manifest, run.model)
    ranks.together(lambda: checkpoint.verify(path, manifest, rank=ranks.rank, world_size=ranks.world_size))
    return Checkpoint(path, manifest)


def check_finite(share: Mapping[str, Tensor], run: RunConfig, step: int, ranks: Ranks) -> None:
    """Raises NonFiniteError, on all processes, when a number that any gives is not finite."""
    bad = not_finite(share)
    rank = ranks.largest(0 if bad is None else ranks.rank + 1) - 1
    if rank >= 0:
        what = bad if bad is not None else f"a tensor of rank {rank}"
        raise NonFiniteError(
            f"step {step}: {what} is not finite after the update; this state is not saved, {newest_checkpoint(run)}"
        )


def newest_checkpoint(run: RunConfig) -> str:
    """For a message about a state that is not saved."""
    found = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    return f"{found[-1].name} is the newest that is" if found else "and there is no earlier one"
