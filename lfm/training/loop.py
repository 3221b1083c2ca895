"""The training loop: read a step's rows, update, log, validate, sample, save; stop on a signal; resume exactly."""

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lfm.data.order import row_order
from lfm.data.reader import RowReader
from lfm.data.stream import BatchStream, open_split, resume_row
from lfm.data.tokenizer import Tokenizer
from lfm.errors import NonFiniteError, UserError
from lfm.files import write_durably
from lfm.models.generation import check_prompts, generate
from lfm.training import checkpoint
from lfm.training.engine import LocalEngine
from lfm.training.evaluate import evaluate
from lfm.training.metrics import Metrics, Speed, say, show, training_record
from lfm.training.run import RunConfig, owning_folder, write_run_files
from lfm.training.saver import Saver
from lfm.training.schedule import lr_factor

STOPPED = "stopped"
"""In the run folder: signal and step, while a run is stopped that has steps to go; what a job is requeued for."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    best_validation: float = math.inf
    validations_without_gain: int = 0


def train(run: RunConfig) -> Progress:
    """Train to `run.training.steps`, or to a signal, from the newest checkpoint or from the start."""
    with owning_folder(run):
        (run.folder / STOPPED).unlink(missing_ok=True)
        return _train(run)


def _train(run: RunConfig) -> Progress:
    if run.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda and no GPU is visible; use training.device=cpu or auto")
    rows = open_split(run.data, "train", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    held_out = open_split(run.data, "validation", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    tokenizer = Tokenizer.from_file(Path(run.data.path).expanduser() / "tokenizer.json")
    prompts = [tokenizer.encode(prompt) for prompt in run.samples.prompts]
    check_prompts(prompts, run.model.seq_length)
    start, weights = _starting_point(run, rows), _starting_weights(run)
    write_run_files(run)
    print(run.model.count_parameters().report(), flush=True)

    torch.manual_seed(run.seed)
    engine = LocalEngine(
        run.model,
        run.optimizer,
        seed=run.seed,
        device=run.device,
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
    )
    progress = _restore(run, engine, start, weights)
    log = Metrics(run.logging, run.folder, name=run.name, resumed_step=progress.step)
    stream = BatchStream(
        rows,
        seed=run.seed,
        rows_per_step=run.training.global_batch_size,
        start_row=resume_row(start[1]["data"], rows, seed=run.seed) if start is not None else 0,
        prefetch_threads=run.data.prefetch_threads,
        prefetch_steps=run.data.prefetch_steps,
    )
    speed = Speed(run.model, engine)
    saved_step = progress.step if start is not None else -1

    def save() -> None:
        nonlocal saved_step
        if saved_step == progress.step:
            return
        bar.set_postfix_str("saving")
        manifest = {
            "config": run.model_dump(mode="json"),
            "progress": asdict(progress) | {"best_validation": _finite(progress.best_validation)},
            "counters": engine.counters(),
            "data": stream.state(),
            "rng": checkpoint.rng_state(run.device),
        }
        saver.save(progress.step, engine.tensors(), manifest, tokenizer.definition)
        saved_step = progress.step

    saver = Saver(run.folder / "checkpoints", keep=run.checkpoint.keep, asynchronous=run.checkpoint.asynchronous)
    with _stop_on_signal() as stopped_by, _progress_bar(run, progress) as bar, saver:
        while progress.step < run.training.steps and not stopped_by() and not _patience_is_over(run, progress):
            first_row = stream.position
            with _saving_on_damage(save):
                ids, lengths = stream.next()
            lr = run.optimizer.lr * lr_factor(run.schedule, progress.step, run.training.steps)
            try:
                result = engine.forward_backward(ids, lengths)
                grad_norm = engine.step(lr)
            except NonFiniteError as error:
                batch = row_order(run.seed, len(rows), first_row, run.training.global_batch_size).tolist()
                raise NonFiniteError(
                    f"step {progress.step + 1}: {error}; no update was made; the batch is data rows {batch}"
                ) from None
            progress.step += 1
            progress.tokens += ids.numel()
            speed.add(ids.numel(), result.attended_pairs)
            bar.update()

            last = progress.step == run.training.steps
            if _due(progress.step, run.logging.every_steps) or last:
                record = {"step": progress.step, "tokens": progress.tokens, "lr": lr, "grad_norm": grad_norm}
                remaining = (run.training.steps - progress.step) * ids.numel()
                record |= training_record(result) | speed.measure(remaining)
                log.write(record)
                show(bar, record)
            if _due(progress.step, run.validation.every_steps) or last:
                with _saving_on_damage(save):
                    log.write(_validate(run, engine, held_out, progress))
                log.plot()
                speed.restart()
            if _due(progress.step, run.samples.every_steps) or last or _patience_is_over(run, progress):
                with _saving_on_damage(save):
                    _sample(run, engine, tokenizer, prompts, progress.step)
                speed.restart()
            if _due(progress.step, run.checkpoint.every_steps):
                save()
                speed.restart()
        if run.checkpoint.save_at_end or stopped_by():
            save()
        stream.close()
    log.plot()
    if stopped_by():
        how = "the same command" if run.checkpoint.resume == "auto" else "the same command with checkpoint.resume=auto"
        print(f"stopped by {stopped_by()} after step {progress.step}; saved, {how} goes on", flush=True)
        if progress.step < run.training.steps and not _patience_is_over(run, progress):
            write_durably(run.folder / STOPPED, f"{stopped_by()} {progress.step}\n".encode())
    elif _patience_is_over(run, progress):
        print(f"stopped early after step {progress.step}: validation.patience={run.validation.patience} reached")
    return progress


@contextmanager
def _saving_on_damage(save: Callable[[], None]) -> Iterator[None]:
    """Data that is damaged or gone ends the run; the steps already made are saved first."""
    try:
        yield
    except (UserError, OSError):
        save()
        raise


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _patience_is_over(run: RunConfig, progress: Progress) -> bool:
    return 0 < run.validation.patience <= progress.validations_without_gain


def _starting_point(run: RunConfig, rows: RowReader) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint to go on from and its manifest; None for a fresh start.  Raises UserError."""
    folder, wanted = run.folder / "checkpoints", run.checkpoint.resume
    checkpoint.remove_unfinished(folder)
    existing = checkpoint.whole_checkpoints(folder)
    if wanted == "never" and existing:
        raise UserError(f"checkpoint.resume=never, but {run.folder} holds {existing[-1].name}; give another name=NAME")
    if wanted == "never" or (wanted == "auto" and not existing):
        return None
    path = existing[-1] if wanted == "auto" else checkpoint.find(Path(wanted))
    manifest = checkpoint.read_manifest(path)
    checkpoint.check_architecture(path, manifest, run.model)
    resume_row(manifest["data"], rows, seed=run.seed)
    checkpoint.verify(path, manifest)
    step = manifest["progress"]["step"]
    checkpoint.set_newer_aside(folder, step)
    if step >= run.training.steps:
        say(f"step {step} is reached already: raise training.steps={run.training.steps} to train on")
    return path, manifest


def _starting_weights(run: RunConfig) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint of `checkpoint.init_from` and its manifest, if that is set.  Raises UserError."""
    if run.checkpoint.init_from is None:
        return None
    path = checkpoint.find(Path(run.checkpoint.init_from))
    manifest = checkpoint.read_manifest(path)
    checkpoint.check_architecture(path, manifest, run.model)
    checkpoint.verify(path, manifest)
    return path, manifest


def _restore(
    run: RunConfig,
    engine: LocalEngine,
    start: tuple[Path, dict[str, Any]] | None,
    weights: tuple[Path, dict[str, Any]] | None,
) -> Progress:
    """Fill the engine from `start`, else with the weights alone of `weights`, else leave it fresh."""
    if start is not None:
        path, manifest = start
        checkpoint.load_tensors(path, manifest, engine.tensors())
        engine.load_counters(manifest["counters"])
        checkpoint.set_rng_state(manifest["rng"], run.device)
        saved = manifest["progress"]
        best = saved["best_validation"]
        print(f"resuming from {path} at step {saved['step']}", flush=True)
        return Progress(**(saved | {"best_validation": math.inf if best is None else best}))
    if weights is not None:
        path, manifest = weights
        targets = {k: t for k, t in engine.tensors().items() if k.startswith(("master.", "frozen."))}
        checkpoint.load_tensors(path, manifest, targets)
        engine.publish_masters()
        print(f"starting from the weights of {path}", flush=True)
    return Progress()


def _validate(run: RunConfig, engine: LocalEngine, held_out: RowReader, progress: Progress) -> dict[str, Any]:
    """Mean cross entropy over the first rows of the validation split; keeps count for early stopping."""
    batch = run.training.micro_batch_size
    found = evaluate(engine.evaluate, held_out, max_rows=run.validation.max_rows, batch_rows=batch)
    loss = found.loss
    if loss < progress.best_validation:
        progress.best_validation, progress.validations_without_gain = loss, 0
    else:
        progress.validations_without_gain += 1
    say(f"step {progress.step}: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f})")
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "validation_loss": loss,
        "validation_perplexity": math.exp(min(loss, 700)),
        "validation_labels": found.labels,
    }


def _sample(run: RunConfig, engine: LocalEngine, tokenizer: Tokenizer, prompts: list[list[int]], step: int) -> None:
    """Continue the configured prompts; the training RNG is not touched."""
    if not prompts:
        return
    texts = [list(prompt) for prompt in prompts]
    engine.model.eval()
    for tokens in generate(engine.model, prompts, run.samples.sampling, end_of_document=tokenizer.eod_id):
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    whole = "\n\n--------\n\n".join(tokenizer.decode(text) for text in texts) + "\n"
    (run.folder / "samples").mkdir(exist_ok=True)
    write_durably(run.folder / "samples" / f"step_{step:08d}.txt", whole.encode())


def _progress_bar(run: RunConfig, progress: Progress) -> tqdm:
    # disable=None: no bar where stderr is not a terminal; `show` then prints a line each time instead.
    return tqdm(total=run.training.steps, initial=progress.step, unit="step", disable=None, dynamic_ncols=True)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], str | None]]:
    """The name of the stop signal that came, if any: the loop then saves and ends.  A second Ctrl-C interrupts that."""
    received: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        print(f"{received[0]}: saving after this step", file=sys.stderr, flush=True)

    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
