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
from lfm.errors import UserError
from lfm.models.generation import generate
from lfm.training import checkpoint
from lfm.training.engine import LocalEngine, NonFiniteError
from lfm.training.evaluate import evaluate
from lfm.training.metrics import Metrics, Speed, show, training_record
from lfm.training.run import RunConfig, write_run_files
from lfm.training.schedule import lr_factor


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    best_validation: float = math.inf
    validations_without_gain: int = 0


def train(run: RunConfig) -> Progress:
    """Train to `run.training.steps`, or to a signal, from the newest checkpoint or from the start."""
    if run.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda and no GPU is visible; use training.device=cpu or auto")
    rows = open_split(run.data, "train", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    held_out = open_split(run.data, "validation", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    tokenizer_file = Path(run.data.path) / "tokenizer.json"
    start = _starting_point(run, rows)
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
    progress = _restore(run, engine, start)
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
        folder = run.folder / "checkpoints"
        checkpoint.save(
            folder, progress.step, engine.tensors(), manifest, keep=run.checkpoint.keep, tokenizer=tokenizer_file
        )
        saved_step = progress.step

    with _stop_on_signal() as stopped_by, _progress_bar(run, progress) as bar:
        while progress.step < run.training.steps and not stopped_by() and not _patience_is_over(run, progress):
            first_row = stream.position
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
                log.write(_validate(run, engine, held_out, progress))
                log.plot()
                speed.restart()
            if _due(progress.step, run.samples.every_steps) or last:
                _sample(run, engine, tokenizer_file, progress.step)
                speed.restart()
            if _due(progress.step, run.checkpoint.every_steps):
                save()
                speed.restart()
        if run.checkpoint.save_at_end or stopped_by():
            save()
        stream.close()
    log.plot()
    if stopped_by():
        print(f"stopped by {stopped_by()} after step {progress.step}; saved, the same command goes on", flush=True)
    elif _patience_is_over(run, progress):
        print(f"stopped early after step {progress.step}: validation.patience={run.validation.patience} reached")
    return progress


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
    return path, manifest


def _restore(run: RunConfig, engine: LocalEngine, start: tuple[Path, dict[str, Any]] | None) -> Progress:
    """Fill the engine from `start`, or its weights alone from `checkpoint.init_from`, or leave it fresh."""
    if start is not None:
        path, manifest = start
        checkpoint.load_tensors(path, manifest, engine.tensors())
        engine.load_counters(manifest["counters"])
        checkpoint.set_rng_state(manifest["rng"], run.device)
        saved = manifest["progress"]
        best = saved["best_validation"]
        print(f"resuming from {path} at step {saved['step']}", flush=True)
        return Progress(**(saved | {"best_validation": math.inf if best is None else best}))
    if run.checkpoint.init_from is not None:
        path = checkpoint.find(Path(run.checkpoint.init_from))
        manifest = checkpoint.read_manifest(path)
        checkpoint.check_architecture(path, manifest, run.model)
        checkpoint.verify(path, manifest)
        weights = {k: t for k, t in engine.tensors().items() if k.startswith(("master.", "frozen."))}
        checkpoint.load_tensors(path, manifest, weights)
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
    tqdm.write(f"step {progress.step}: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f})")
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "validation_loss": loss,
        "validation_perplexity": math.exp(min(loss, 700)),
        "validation_labels": found.labels,
    }


def _sample(run: RunConfig, engine: LocalEngine, tokenizer_file: Path, step: int) -> None:
    """Continue the configured prompts; the training RNG is not touched."""
    if not run.samples.prompts:
        return
    tokenizer = Tokenizer.from_file(tokenizer_file)
    prompts = [tokenizer.encode(prompt) for prompt in run.samples.prompts]
    texts = [list(prompt) for prompt in prompts]
    engine.model.eval()
    for tokens in generate(engine.model, prompts, run.samples.sampling, end_of_document=tokenizer.eod_id):
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    folder = run.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    whole = "\n\n--------\n\n".join(tokenizer.decode(text) for text in texts) + "\n"
    checkpoint.write_atomically(folder / f"step_{step:08d}.txt", whole)


def _progress_bar(run: RunConfig, progress: Progress) -> tqdm:
    # disable=None: no bar where stderr is not a terminal; _show then prints a line each time instead.
    return tqdm(total=run.training.steps, initial=progress.step, unit="step", disable=None, dynamic_ncols=True)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], str | None]]:
    """The name of the stop signal that came, if any: the loop then saves and ends.  A second Ctrl-C ends at once."""
    received: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        print(f"{received[0]}: saving after this step", file=sys.stderr, flush=True)

    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
