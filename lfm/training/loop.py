"""The training loop: read a step's rows, update, log, validate, sample, save; stop on a signal; resume exactly."""

import math
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfm.checkpoint import folder as checkpoint
from lfm.data.batch import Batch
from lfm.data.reader import RowReader
from lfm.errors import NonFiniteError
from lfm.evaluation.held_out import HeldOut, evaluate, spread, together
from lfm.files import reason, refusing, shown, write_durably
from lfm.inference.text import continuations
from lfm.job.process import Process
from lfm.job.rendezvous import Stopped
from lfm.job.watch import Watch
from lfm.layout.layout import Layout
from lfm.talk import complain, say, talking, waiting
from lfm.training.engine import StepResult
from lfm.training.local_engine import LocalEngine
from lfm.training.metrics import show, training_record
from lfm.training.plan import peak_rate, short_warmup
from lfm.training.run import RunConfig, owning_folder, write_run_files
from lfm.training.saves import Saves
from lfm.training.schedule import lr_factor
from lfm.training.start import SAVING_SECONDS, Started, started, wishes_to_stop
from lfm.training.state import (
    Progress,
    TrainState,
    make_state,
    newest_checkpoint,
    open_data,
    starting_point,
    starting_weights,
)
from lfm.training.task_scores import score_tasks

STOPPED = "stopped"
"""In the run folder: step and cause, while a run is stopped that has steps to go; what a job is requeued for."""
_SIGNAL_ELSEWHERE = "a signal to another rank"


def train(
    run: RunConfig, process: Process | None = None, layout: Layout | None = None, *, deadline: float | None = None
) -> Progress:
    """Train to `run.training.steps`, to a signal or to `deadline`, by `time.monotonic`, from the newest checkpoint or
    from the start.

    Without a layout, or at ZeRO stage 0, the local engine trains in this process alone.  Else every process of the
    layout calls this, and no exception leaves where there are several: see `watched`.
    """
    process = process or Process()
    with talking(), wishes_to_stop(deadline) as why_stop:
        try:
            with started(run, process, layout, why_stop) as start:
                return _train(run, start)
        except Stopped as stopped:
            return _stopped_before_the_start(run, process, str(stopped))


def _train(run: RunConfig, start: Started) -> Progress:
    ranks = start.ranks
    with waiting("opening data, checkpoint and model") if ranks.is_main else nullcontext():
        state = open_state(run, start)
    with state.metrics or nullcontext(), progress_bar(state) as bar, Saves(state, start, bar) as saves:
        stopped = train_steps(run, start, state, saves) or ranks.largest(start.why_stop() is not None) > 0
        if stopped and ranks.is_main:
            say(f"{start.why_stop() or _SIGNAL_ELSEWHERE}: saving step {state.progress.step}")
        saves.finish(wanted=run.checkpoint.save_at_end or stopped)
        state.stream.close()
    if ranks.is_main:
        _tell_the_end(run, state, (start.why_stop() or _SIGNAL_ELSEWHERE) if stopped else None)
    return state.progress


def open_state(run: RunConfig, start: Started) -> TrainState:
    """Data, checkpoint and model of a run, and the files of its start.  Raises UserError."""
    ranks, watch = start.ranks, start.watch
    watch.phase("opening data and checkpoint", allow_seconds=SAVING_SECONDS)
    data = open_data(run)
    found, weights = starting_point(run, data.rows, ranks), starting_weights(run, ranks)
    if ranks.is_main:
        with refusing(f"make room and put nothing else into {run.folder}, or set output=DIR"):
            (run.folder / STOPPED).unlink(missing_ok=True)
            write_run_files(run, step=found.manifest["progress"]["step"] if found is not None else 0)
        if run.logging.print_config:
            say(run.model_dump_json(indent=1))
        say(run.model.count_parameters().report())
        say(peak_rate(run))
        for wrong in (short_warmup(run), much_padding(data.rows)):
            if wrong is not None:
                complain(wrong)

    watch.phase("building the model", allow_seconds=SAVING_SECONDS)
    return make_state(run, ranks, data, start.make_engine(), found, weights)


_MUCH_PADDING = 0.1


def much_padding(rows: RowReader) -> str | None:
    """What is wrong where many positions hold no text; None: few do."""
    share = rows.index.num_padding / max(1, len(rows) * rows.index.seq_length)
    if share < _MUCH_PADDING:
        return None
    return (
        f"{share:.0%} of the positions of the rows are padding, which takes as long as text and counts in tokens and "
        "tokens/s; prepare with another packing or shorter rows"
    )


def train_steps(run: RunConfig, start: Started, state: TrainState, saves: Saves) -> bool:
    """Train to the last step or until patience is over; whether a wish to stop came before."""
    steps, watch, ranks = run.training.steps, start.watch, start.ranks
    while state.progress.step < steps and not _patience_is_over(run, state.progress):
        watch.phase(f"step {state.progress.step + 1}: reading rows")
        # One agreement a step: to stop, or else that a save in the background has failed somewhere.
        wish = ranks.largest(2 if start.why_stop() is not None else 1 if saves.has_failed else 0)
        if wish == 2:
            return True
        if wish == 1:
            saves.settle()
        with saves.before_damage_ends_the_run():
            batch = ranks.together(state.stream.next)
        # Kernels are compiled in the first step; a full-size model on a GPU takes a minute for it.
        is_first = state.speed.is_new and ranks.is_main
        with waiting("the first step, which compiles what it needs") if is_first else nullcontext():
            update = _update(run, state, batch, watch)
        saves.bar.update(state.progress.step - saves.bar.n)

        step = state.progress.step
        last = step == steps
        if _due(step, run.logging.every_steps) or last:
            _log(run, state, saves, update)
        if _due(step, run.validation.every_steps) or last:
            watch.phase(f"step {step}: validation")
            with saves.before_damage_ends_the_run():
                validated = _validate(run, state)
            _judge(run, state, saves, validated)
            if run.checkpoint.keep_best and state.progress.validations_without_gain == 0:
                saves.save_best()
            state.speed.restart()
        if _due(step, run.samples.every_steps) or last or _patience_is_over(run, state.progress):
            with saves.before_damage_ends_the_run():
                _sample(run, state)
            state.speed.restart()
        if run.evaluation.tasks and (
            _due(step, run.evaluation.every_steps) or last or _patience_is_over(run, state.progress)
        ):
            watch.phase(f"step {step}: tasks", allow_seconds=SAVING_SECONDS)
            with saves.before_damage_ends_the_run():
                _score_tasks(run, state)
            state.speed.restart()
        if _due(step, run.checkpoint.every_steps):
            saves.save()
            state.speed.restart()
    return False


@dataclass(frozen=True)
class _Update:
    """What one optimizer update leaves to tell."""

    result: StepResult
    lr: float
    grad_norm: float


def _update(run: RunConfig, state: TrainState, batch: Batch, watch: Watch) -> _Update:
    """Make one.  Raises NonFiniteError, without, naming the rows."""
    engine, step = state.engine, state.progress.step
    lr = _lr(run, step)
    try:
        watch.phase(f"step {step + 1}: forward and backward")
        engine.start_step(step, run.training.steps)
        result, grad_norm = engine.update(batch, lr)
    except NonFiniteError as error:
        numbers = state.data.rows.order(run.seed, state.position, run.training.global_batch_size).tolist()
        made_by = f"; the updates before it were made with optimizer.lr={run.optimizer.lr:g}" if step > 0 else ""
        raise NonFiniteError(
            f"step {step + 1}: {error}; no update was made; the batch is data rows {numbers}{made_by}"
        ) from None
    state.advance(result)
    return _Update(result, lr, grad_norm)


def _lr(run: RunConfig, step: int) -> float:
    return run.optimizer.peak_lr(run.model.hidden_size) * lr_factor(run.schedule, step, run.training.steps)


def _log(run: RunConfig, state: TrainState, saves: Saves, update: _Update) -> None:
    """Write a record of the steps since the last one."""
    ranks, progress, steps = state.ranks, state.progress, run.training.steps
    memory = ranks.largest(state.engine.memory_bytes())
    waited = ranks.largest(int(1e6 * state.stream.wait_seconds)) / 1e6  # of the slowest process
    record = {
        "step": progress.step,
        "tokens": progress.tokens,
        "lr": update.lr,
        # An update whose float16 gradients overflowed has no norm.
        **({"grad_norm": update.grad_norm} if math.isfinite(update.grad_norm) else {}),
        "mean_cross_entropy": statistics.mean(state.losses),
        # After the last step the rate is that of the last, as schedules end there.
        "next_lr": _lr(run, min(progress.step, steps - 1)),
        "data_wait_seconds": waited / len(state.losses),
        **training_record(update.result),
        **state.engine.record(),
        **state.speed.measure((steps - progress.step) * state.tokens_per_step, memory),
    }
    if saves.stalls:  # how long training was held, and the last save that is whole took
        record |= {"save_stall_seconds": sum(saves.stalls), "save_seconds": saves.saver.last_seconds}
    state.stream.wait_seconds = 0.0
    state.losses.clear()
    saves.stalls.clear()
    if state.metrics is not None:
        state.metrics.write(record)
        show(saves.bar, record, ranks.world_size)


def _validate(run: RunConfig, state: TrainState) -> dict[str, Any]:
    """Mean cross entropy over rows of every stream's validation split; keeps count for early stopping."""
    engine, progress, ranks = state.engine, state.progress, state.ranks
    batch = engine.rows_a_round
    by_mode: dict[str, HeldOut] = {}
    by_stream: dict[str, HeldOut] = {}
    for mode in engine.evaluation_modes or ("",):
        with engine.evaluating(mode):
            parts = {
                name: evaluate(engine.evaluate, rows, max_rows=run.validation.max_rows, batch_rows=batch, ranks=ranks)
                for name, rows in state.data.held_out.items()
            }
        by_mode[mode] = together(list(parts.values()))
        if mode == engine.evaluation_mode and len(parts) > 1:
            by_stream = parts
    found = by_mode[engine.evaluation_mode]
    loss = found.loss
    if loss < progress.best_validation:
        progress.best_validation, progress.validations_without_gain = loss, 0
    else:
        progress.validations_without_gain += 1
    bits: dict[str, float] = {}
    if found.text_bytes and not found.masked:
        bits["validation_bits_per_byte"] = found.bits_per_byte(found.text_bytes, run.model.vocab_size)
    if ranks.is_main:
        modes = ", ".join(f"{mode.replace('_', ' ')} {other.loss:.4f}" for mode, other in by_mode.items() if mode)
        perplexity = f"perplexity {math.exp(min(loss, 700)):.2f}"
        if bits:
            perplexity += f", {bits['validation_bits_per_byte']:.3f} bits per byte"
        total = [len(rows) for rows in state.data.held_out.values()]
        read = sum(len(spread(run.validation.max_rows, each)) for each in total)
        perplexity += "" if read == sum(total) else f", of {read:,} of {sum(total):,} rows"
        say(f"step {progress.step}: validation loss {loss:.4f} ({'; '.join(filter(None, (perplexity, modes)))})")
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "validation_loss": loss,
        "validation_perplexity": math.exp(min(loss, 700)),
        "validation_labels": found.labels,
        **bits,
        **{f"validation_loss_{mode}": other.loss for mode, other in by_mode.items() if mode},
        **{f"validation_loss_of_{name}": part.loss for name, part in by_stream.items()},
    }


def _judge(run: RunConfig, state: TrainState, saves: Saves, validated: dict[str, Any]) -> None:
    """Write what a validation found.  Raises NonFiniteError for a loss that is not finite: nothing more is saved."""
    step, loss = state.progress.step, validated["validation_loss"]
    if not math.isfinite(loss):
        saves.settle()
        raise NonFiniteError(
            f"step {step}: the validation loss is {loss}; this state is not saved, {newest_checkpoint(run)}"
        )
    if state.metrics is not None:
        state.metrics.write(validated)
        state.metrics.plot()
        saves.saver.spared = _spared(run, step, loss, saves.saver.spared)


def _spared(run: RunConfig, step: int, loss: float, spared: Path | None) -> Path | None:
    """The checkpoint that no save may drop while the validation loss is absurd: the newest when it became so.

    Twice ln V is far above what knows nothing; training may come back from there, so it goes on.
    """
    guessing = math.log(run.model.vocab_size)
    if loss <= 2 * guessing:
        return None
    found = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    if spared is None and found:
        spared = found[-1]
    kept = f"; {spared.name} is kept until it falls" if spared is not None else ""
    complain(f"step {step}: the validation loss of {loss:.4g} is far above {guessing:.2f}, that of guessing{kept}")
    return spared


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _patience_is_over(run: RunConfig, progress: Progress) -> bool:
    return 0 < run.validation.patience <= progress.validations_without_gain


def _sample(run: RunConfig, state: TrainState) -> None:
    """Continue the configured prompts.

    A model in pieces does not generate: `lfm generate` does, from a checkpoint.
    """
    engine, tokenizer, prompts = state.engine, state.data.tokenizer, state.data.prompts
    if not prompts or not isinstance(engine, LocalEngine):
        return
    engine.model.eval()
    *_, found = continuations(engine.model, tokenizer, prompts, run.samples.sampling)
    texts = [tokenizer.decode(prompt) + made.text for prompt, made in zip(prompts, found, strict=True)]
    whole = "\n\n--------\n\n".join(texts) + "\n"
    path = run.folder / "samples" / f"step_{state.progress.step:08d}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        write_durably(path, whole.encode())
    except OSError as error:
        complain(f"{path} is not written ({reason(error)})")


def _score_tasks(run: RunConfig, state: TrainState) -> None:
    record = score_tasks(run, state)
    if state.metrics is not None:
        state.metrics.write(record)


def progress_bar(state: TrainState) -> tqdm:
    """Of the steps of a run, on rank 0."""
    # disable=None: no bar where stderr is not a terminal; `show` then prints a line each time instead.
    disable, steps = None if state.ranks.is_main else True, state.run.training.steps
    return tqdm(total=steps, initial=state.progress.step, unit="step", disable=disable, dynamic_ncols=True)


def _tell_the_end(run: RunConfig, state: TrainState, cause: str | None) -> None:
    """Draw the plot, and say why the run ended where it did; `cause`: what stopped it."""
    step, patience_is_over = state.progress.step, _patience_is_over(run, state.progress)
    assert state.metrics is not None
    state.metrics.plot()
    if state.data.prompts and not isinstance(state.engine, LocalEngine):
        say(f"samples: lfm generate --checkpoint {shown(run.folder)} --prompt TEXT")
    if cause is not None:
        how = "the same command" if run.checkpoint.resume == "auto" else "the same command with checkpoint.resume=auto"
        goes_on = step < run.training.steps and not patience_is_over
        if not goes_on:
            say(f"{cause} came after step {step}, the last; the run is whole and saved")
        else:
            say(f"stopped by {cause} after step {step}; saved, {how} goes on")
            with refusing("the run is saved, and goes on when it is started again"):
                write_durably(run.folder / STOPPED, f"{step} {cause}\n".encode())
    elif patience_is_over:
        say(f"stopped early after step {step}: validation.patience={run.validation.patience} reached")


def _stopped_before_the_start(run: RunConfig, process: Process, cause: str) -> Progress:
    """Nothing was trained: the run stands where its newest checkpoint is, and can be started again."""
    whole = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    step = int(whole[-1].name.removeprefix("step_")) if whole else 0
    if process.rank == 0:
        with owning_folder(run):
            write_durably(run.folder / STOPPED, f"{step} {cause}\n".encode())
        say(f"stopped by {cause} while the ranks met; the run stands at step {step}, the same command goes on")
    return Progress(step=step)
