"""The training loop: read a step's rows, update, log, validate, sample, save; stop on a signal; resume exactly."""

import hashlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.matching import check_architecture, check_layers, check_optimizer
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import load_tensors, not_finite
from lfm.data.consumed import START, Consumed, ConsumedRecord, chained
from lfm.data.reader import RowReader
from lfm.data.stream import BatchStream, open_tokenizer, open_training, open_validation, resume_row
from lfm.data.tokenizer import Tokenizer
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.held_out import HeldOut, evaluate, together
from lfm.files import reason, refusing, write_durably
from lfm.inference.sampling import check_prompts, generate
from lfm.job import health
from lfm.job.launchers import Launchers
from lfm.job.process import Process, prepare_environment, require_packages
from lfm.job.ranks import Ranks
from lfm.job.rendezvous import Stopped, meet
from lfm.job.watch import Watch, watched
from lfm.layout.layout import Layout
from lfm.talk import complain, say, talking
from lfm.training.engine import Engine
from lfm.training.local_engine import LocalEngine
from lfm.training.metrics import Metrics, Speed, show, training_record
from lfm.training.run import RunConfig, owning_folder, write_run_files
from lfm.training.schedule import lr_factor

STOPPED = "stopped"
"""In the run folder: step and cause, while a run is stopped that has steps to go; what a job is requeued for."""
_SIGNAL_ELSEWHERE = "a signal to another rank"
_ONE_PRESS_SECONDS = 1.0
"""Of one Ctrl-C a process may get several signals, from the terminal and from its launcher."""
_SAVING_SECONDS = 7200.0
"""A save, or the first load of a large checkpoint, may take this long before it counts as a hang."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    best_validation: float = math.inf
    validations_without_gain: int = 0
    chain: str = START
    """Of the digests of all steps so far: what they consumed."""


def train(run: RunConfig, process: Process | None = None, layout: Layout | None = None) -> Progress:
    """Train to `run.training.steps`, or to a signal, from the newest checkpoint or from the start.

    Without a layout, or at ZeRO stage 0, the local engine trains in this process alone.  Else every process of the
    layout calls this, and no exception leaves where there are several: see `watched`.
    """
    process, launchers = process or Process(), Launchers()
    device = _device(run, process)
    with talking(), _stop_on_signal() as signalled:

        def why_stop() -> str | None:
            gone = launchers.gone()
            return signalled() or (f"the end of its launcher, {gone}," if gone else None)

        if layout is None or layout.zero_stage == 0:
            with owning_folder(run), _watching(run, process) as watch:
                return _train(run, device, Ranks(), watch, why_stop, saver_group=None, make_engine=_local_engine)
        return _train_in_parallel(run, process, layout, device, why_stop)


def _train_in_parallel(
    run: RunConfig, process: Process, layout: Layout, device: torch.device, why_stop: Callable[[], str | None]
) -> Progress:

    require_packages()
    prepare_environment(device.type)
    from lfm.parallel import groups as process_groups
    from lfm.training.parallel_engine import ParallelEngine

    seconds = max(_SAVING_SECONDS, 2 * run.parallel.hang_timeout_seconds)  # the watch speaks first
    store = None
    if process.world_size > 1:
        limit_seconds = run.parallel.rendezvous_timeout_seconds
        try:
            store = meet(process, limit_seconds=limit_seconds, why_stop=why_stop)
        except Stopped as stopped:
            return _stopped_before_the_start(run, process, str(stopped))

    def parallel_engine(run: RunConfig, device: torch.device, watch: Watch) -> Engine:
        groups = process_groups.make_groups(layout, device)
        return ParallelEngine(
            run.model,
            run.optimizer,
            groups,
            seed=run.seed,
            dtype=run.dtype,
            micro_batch_size=run.training.micro_batch_size,
            recompute=run.training.recompute,
            objective=run.objective,
            phase=watch.phase,
        )

    with _watching(run, process) as watch:
        watch.phase("connecting")
        process_groups.join(process, device, timeout_seconds=seconds, store=store)
        watch.phase("health check")
        health.check(process, device, fingerprint=hashlib.sha256(run.to_yaml().encode()).hexdigest()[:12])
        ranks = Ranks(process.rank, process.world_size, process_groups.gloo_group(seconds))
        if ranks.is_main:
            say(f"layout: {layout.describe()}")
        with owning_folder(run) if ranks.is_main else nullcontext():
            saver_group = process_groups.gloo_group(seconds)
            progress = _train(run, device, ranks, watch, why_stop, saver_group, parallel_engine)
            watch.phase("leaving")
            dist.barrier(group=ranks.group)
        process_groups.leave()
    return progress


def _stopped_before_the_start(run: RunConfig, process: Process, cause: str) -> Progress:
    """Nothing was trained: the run stands where its newest checkpoint is, and can be started again."""
    whole = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    step = int(whole[-1].name.removeprefix("step_")) if whole else 0
    if process.rank == 0:
        with owning_folder(run):
            write_durably(run.folder / STOPPED, f"{step} {cause}\n".encode())
        say(f"stopped by {cause} while the ranks met; the run stands at step {step}, the same command goes on")
    return Progress(step=step)


def _device(run: RunConfig, process: Process) -> torch.device:
    if run.device.type != "cuda":
        return run.device
    if process.local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise UserError(
            f"training.device=cuda: rank {process.rank} needs GPU {process.local_rank} and {visible or 'no GPU'} is "
            "visible; start fewer processes a node, or use training.device=cpu or auto"
        )
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    return device


def _watching(run: RunConfig, process: Process) -> AbstractContextManager[Watch]:
    return watched(
        rank=process.rank,
        world_size=process.world_size,
        address=(process.address, process.port),
        heartbeat_timeout_seconds=run.parallel.heartbeat_timeout_seconds,
        hang_timeout_seconds=run.parallel.hang_timeout_seconds,
        report=run.folder / "failure.txt",
    )


def _local_engine(run: RunConfig, device: torch.device, watch: Watch) -> Engine:
    return LocalEngine(
        run.model,
        run.optimizer,
        seed=run.seed,
        device=device,
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
        objective=run.objective,
    )


def _train(
    run: RunConfig,
    device: torch.device,
    ranks: Ranks,
    watch: Watch,
    why_stop: Callable[[], str | None],
    saver_group: dist.ProcessGroup | None,
    make_engine: Callable[[RunConfig, torch.device, Watch], Engine],
) -> Progress:
    watch.phase("opening data and checkpoint", allow_seconds=_SAVING_SECONDS)
    sizes = {"seq_length": run.model.seq_length, "vocab_size": run.model.vocab_size}
    rows = open_training(run.data, **sizes, rows_per_step=run.training.global_batch_size)
    held_out = open_validation(run.data, **sizes)
    tokenizer = open_tokenizer(run.data)
    try:
        prompts = [tokenizer.encode_prompt(prompt) for prompt in run.samples.prompts]
        check_prompts(prompts, run.model.context_limit)
    except UserError as error:
        raise UserError(f"samples.prompts: {error}") from None
    start, weights = _starting_point(run, rows, ranks), _starting_weights(run, ranks)
    if ranks.is_main:
        with refusing(f"make room and put nothing else into {run.folder}, or set output=DIR"):
            (run.folder / STOPPED).unlink(missing_ok=True)
            write_run_files(run, step=start[1]["progress"]["step"] if start is not None else 0)
        if run.logging.print_config:
            say(run.model_dump_json(indent=1))
        say(run.model.count_parameters().report())

    watch.phase("building the model", allow_seconds=_SAVING_SECONDS)
    torch.manual_seed(run.seed)
    engine = make_engine(run, device, watch)
    progress = _restore(run, engine, start, weights, ranks)
    log = None
    if ranks.is_main:
        resumed = {"resumed_step": progress.step, "run_config": run.model_dump(mode="json")}
        log = Metrics(run.logging, run.folder, name=run.folder.name, **resumed)
    done = {"resumed_step": progress.step, "chain": progress.chain}
    consumed = ConsumedRecord(run.folder, **done) if ranks.is_main else None
    global_batch_size = run.training.global_batch_size
    stream = BatchStream(
        rows,
        seed=run.seed,
        rows_per_step=global_batch_size,
        start_row=resume_row(start[1]["data"], rows, seed=run.seed) if start is not None else 0,
        take=engine.rows_of_step(global_batch_size),
        prefetch_threads=run.data.prefetch_threads,
        prefetch_steps=run.data.prefetch_steps,
    )
    speed = Speed(run.model, engine, ranks.world_size)
    saved_step, best_step, lost = progress.step if start is not None else -1, -1, False
    # A step's rows count as consumed when its update is made; another process may fail between the two.
    position = stream.position
    stalls: list[float] = []
    window: list[float] = []

    def save(*, last: bool = False) -> None:
        """In the background or at once.  One that fails is told and made again with the next; `last`: there is none."""
        nonlocal saved_step, lost
        settle()
        if saved_step == progress.step:
            return
        bar.set_postfix_str("saving")
        watch.phase("saving", allow_seconds=_SAVING_SECONDS)
        manifest = {
            "config": run.model_dump(mode="json"),
            "progress": asdict(progress) | {"best_validation": _finite(progress.best_validation)},
            "counters": engine.state_values(),
            "data": stream.state(position),
            "rng": checkpoint.rng_state(device),
        }
        start = time.perf_counter()
        if consumed is not None:
            consumed.sync()
        share = engine.state_tensors()  # after `settle`: the engine may give the same host memory again
        _check_finite(share, run, progress.step, ranks)
        saved_step, lost = progress.step, False
        options = {"owned": engine.state_tensors_are_fresh, "best": best_step == progress.step}
        try:
            saver.save(progress.step, share, manifest, tokenizer.definition, **options)
        except UserError as error:
            if last:
                raise
            give_up(error)
        stalls.append(time.perf_counter() - start)

    def settle() -> None:
        """Wait for the save under way."""
        try:
            saver.wait()
        except UserError as error:
            give_up(error)

    def give_up(error: UserError) -> None:
        nonlocal saved_step, lost
        saved_step, lost = -1, True
        if ranks.is_main:
            complain(f"{error}; the next save tries again")

    def save_before_the_end() -> None:
        save()
        settle()

    saver = Saver(
        run.folder / "checkpoints",
        keep=run.checkpoint.keep,
        asynchronous=run.checkpoint.asynchronous,
        group=saver_group,
    )
    stopped = False
    with log or nullcontext(), _progress_bar(run, progress, ranks) as bar, saver:
        while progress.step < run.training.steps and not _patience_is_over(run, progress):
            watch.phase(f"step {progress.step + 1}: reading rows")
            # One agreement a step: to stop, or else that a save in the background has failed somewhere.
            wish = ranks.largest(2 if why_stop() is not None else 1 if saver.has_failed else 0)
            stopped = wish == 2
            if stopped:
                break
            if wish == 1:
                settle()
            with _saving_on_damage(save_before_the_end):
                batch = ranks.together(stream.next)
            lr = run.optimizer.lr * lr_factor(run.schedule, progress.step, run.training.steps)
            try:
                watch.phase(f"step {progress.step + 1}: forward and backward")
                engine.start_step(progress.step, run.training.steps)
                result = engine.forward_backward(batch)
                grad_norm = engine.step(lr)
            except NonFiniteError as error:
                numbers = rows.order(run.seed, position, global_batch_size).tolist()
                raise NonFiniteError(
                    f"step {progress.step + 1}: {error}; no update was made; the batch is data rows {numbers}"
                ) from None
            position = stream.position
            tokens = global_batch_size * batch.ids.shape[1]
            progress.step += 1
            progress.tokens += tokens
            progress.chain = chained(progress.chain, progress.step, result.digest)
            if consumed is not None:
                consumed.add(Consumed(progress.step, result.digest, progress.chain))
            speed.add(tokens, result.attended_pairs)
            window.append(result.terms["cross_entropy"])
            bar.update()

            last = progress.step == run.training.steps
            if _due(progress.step, run.logging.every_steps) or last:
                memory = ranks.largest(engine.memory_bytes())
                record = {"step": progress.step, "tokens": progress.tokens, "lr": lr, "grad_norm": grad_norm}
                # After the last step the rate is that of the last, as schedules end there.
                following = min(progress.step, run.training.steps - 1)
                next_lr = run.optimizer.lr * lr_factor(run.schedule, following, run.training.steps)
                record |= {"mean_cross_entropy": statistics.mean(window), "next_lr": next_lr}
                waited = ranks.largest(int(1e6 * stream.wait_seconds)) / 1e6 / len(window)  # of the slowest process
                record |= {"data_wait_seconds": waited}
                stream.wait_seconds = 0.0
                window.clear()
                record |= training_record(result) | speed.measure((run.training.steps - progress.step) * tokens, memory)
                if stalls:  # how long training was held, and the last save that is whole took
                    record |= {"save_stall_seconds": sum(stalls), "save_seconds": saver.last_seconds}
                stalls.clear()
                if log is not None:
                    log.write(record)
                    show(bar, record, ranks.world_size)
            if _due(progress.step, run.validation.every_steps) or last:
                watch.phase(f"step {progress.step}: validation")
                with _saving_on_damage(save_before_the_end):
                    validated = _validate(run, engine, held_out, progress, ranks)
                loss = validated["validation_loss"]
                if not math.isfinite(loss):
                    settle()
                    raise NonFiniteError(
                        f"step {progress.step}: the validation loss is {loss}; this state is not saved, "
                        f"{_newest_checkpoint(run)}"
                    )
                if log is not None:
                    log.write(validated)
                    log.plot()
                    saver.spared = _spared(run, progress.step, loss, saver.spared)
                if run.checkpoint.keep_best and progress.validations_without_gain == 0:
                    best_step = progress.step
                    save()
                speed.restart()
            if _due(progress.step, run.samples.every_steps) or last or _patience_is_over(run, progress):
                with _saving_on_damage(save_before_the_end):
                    _sample(run, engine, tokenizer, prompts, progress.step)
                speed.restart()
            if _due(progress.step, run.checkpoint.every_steps):
                save()
                speed.restart()
        stopped = stopped or ranks.largest(why_stop() is not None) > 0
        if stopped and ranks.is_main:
            say(f"{why_stop() or _SIGNAL_ELSEWHERE}: saving step {progress.step}")
        settle()
        if run.checkpoint.save_at_end or stopped or lost:
            save(last=True)
        watch.phase("finishing the last save", allow_seconds=_SAVING_SECONDS)
        saver.wait()
        stream.close()
    if log is None:
        return progress
    log.plot()
    if prompts and not isinstance(engine, LocalEngine):
        say(f"samples: python launch/generate.py --checkpoint {run.folder} --prompt TEXT")
    if stopped:
        how = "the same command" if run.checkpoint.resume == "auto" else "the same command with checkpoint.resume=auto"
        cause = why_stop() or _SIGNAL_ELSEWHERE
        say(f"stopped by {cause} after step {progress.step}; saved, {how} goes on")
        if progress.step < run.training.steps and not _patience_is_over(run, progress):
            with refusing("the run is saved, and goes on when it is started again"):
                write_durably(run.folder / STOPPED, f"{progress.step} {cause}\n".encode())
    elif _patience_is_over(run, progress):
        say(f"stopped early after step {progress.step}: validation.patience={run.validation.patience} reached")
    return progress


@contextmanager
def _saving_on_damage(save: Callable[[], None]) -> Iterator[None]:
    """Data that is damaged or gone ends the run; the steps already made are saved first."""
    try:
        yield
    except (UserError, OSError):
        save()
        raise


def _check_finite(share: Mapping[str, torch.Tensor], run: RunConfig, step: int, ranks: Ranks) -> None:
    """Raises NonFiniteError, on all processes, when a number that any gives is not finite."""
    bad = not_finite(share)
    rank = ranks.largest(0 if bad is None else ranks.rank + 1) - 1
    if rank >= 0:
        what = bad if bad is not None else f"a tensor of rank {rank}"
        raise NonFiniteError(
            f"step {step}: {what} is not finite after the update; this state is not saved, {_newest_checkpoint(run)}"
        )


def _newest_checkpoint(run: RunConfig) -> str:
    found = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    return f"{found[-1].name} is the newest that is" if found else "and there is no earlier one"


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


def _starting_point(run: RunConfig, rows: RowReader, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint to go on from and its manifest; None for a fresh start.  Raises UserError."""
    path = ranks.from_main(lambda: _checkpoint_to_resume(run))
    if path is None:
        return None
    manifest = _verified(path, run, ranks)
    check_optimizer(path, manifest, run.optimizer.kind)
    resume_row(manifest["data"], rows, seed=run.seed)
    step = manifest["progress"]["step"]
    if ranks.is_main:
        with refusing("make the folder writable"):
            checkpoint.set_newer_aside(run.folder / "checkpoints", step)
        if step >= run.training.steps:
            say(f"step {step} is reached already: raise training.steps={run.training.steps} to train on")
    return path, manifest


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
        return checkpoint.find(Path(wanted))
    except UserError as error:
        raise UserError(f"checkpoint.resume={wanted}: {error}; or set it to auto or never") from None


def _starting_weights(run: RunConfig, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint of `checkpoint.init_from` and its manifest, if that is set.  Raises UserError."""
    if run.checkpoint.init_from is None:
        return None
    path = checkpoint.find(Path(run.checkpoint.init_from))
    return path, _verified(path, run, ranks)


def _verified(path: Path, run: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The manifest; each process has verified its part of the files."""
    manifest = read_manifest(path, warn=ranks.is_main)
    check_architecture(path, manifest, run.model)
    check_layers(path, manifest, run.model)
    ranks.together(lambda: checkpoint.verify(path, manifest, rank=ranks.rank, world_size=ranks.world_size))
    return manifest


def _restore(
    run: RunConfig,
    engine: Engine,
    start: tuple[Path, dict[str, Any]] | None,
    weights: tuple[Path, dict[str, Any]] | None,
    ranks: Ranks,
) -> Progress:
    """Fill the engine from `start`, else with the weights alone of `weights`, else leave it fresh."""
    if start is not None:
        path, manifest = start
        engine.load_state_tensors(lambda targets: load_tensors(path, manifest, targets))
        engine.load_state_values(manifest["counters"])
        checkpoint.set_rng_state(path, manifest["rng"], engine.device)
        saved = manifest["progress"]
        best = saved["best_validation"]
        if ranks.is_main:
            say(f"resuming from {path} at step {saved['step']}")
        return Progress(**(saved | {"best_validation": math.inf if best is None else best}))
    if weights is not None:
        path, manifest = weights
        engine.load_state_tensors(lambda targets: load_tensors(path, manifest, targets), kinds=("master", "frozen"))
        if ranks.is_main:
            say(f"starting from the weights of {path}")
    return Progress()


def _validate(
    run: RunConfig, engine: Engine, held_out: dict[str, RowReader], progress: Progress, ranks: Ranks
) -> dict[str, Any]:
    """Mean cross entropy over the first rows of every stream's validation split; keeps count for early stopping."""
    batch = engine.rows_a_round
    by_mode: dict[str, HeldOut] = {}
    by_stream: dict[str, HeldOut] = {}
    for mode in engine.evaluation_modes or ("",):
        with engine.evaluating(mode):
            parts = {
                name: evaluate(engine.evaluate, rows, max_rows=run.validation.max_rows, batch_rows=batch, ranks=ranks)
                for name, rows in held_out.items()
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
    if ranks.is_main:
        modes = ", ".join(f"{mode.replace('_', ' ')} {other.loss:.4f}" for mode, other in by_mode.items() if mode)
        perplexity = f"perplexity {math.exp(min(loss, 700)):.2f}"
        say(f"step {progress.step}: validation loss {loss:.4f} ({'; '.join(filter(None, (perplexity, modes)))})")
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "validation_loss": loss,
        "validation_perplexity": math.exp(min(loss, 700)),
        "validation_labels": found.labels,
        **{f"validation_loss_{mode}": other.loss for mode, other in by_mode.items() if mode},
        **{f"validation_loss_of_{name}": part.loss for name, part in by_stream.items()},
    }


def _sample(run: RunConfig, engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], step: int) -> None:
    """Continue the configured prompts; the training RNG is not touched.

    A model in pieces does not generate: launch/generate.py does, from a checkpoint.
    """
    if not prompts or not isinstance(engine, LocalEngine):
        return
    texts = [list(prompt) for prompt in prompts]
    engine.model.eval()
    for tokens in generate(engine.model, prompts, run.samples.sampling, end_of_document=tokenizer.eod_id):
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    whole = "\n\n--------\n\n".join(tokenizer.decode(text) for text in texts) + "\n"
    path = run.folder / "samples" / f"step_{step:08d}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        write_durably(path, whole.encode())
    except OSError as error:
        complain(f"{path} is not written ({reason(error)})")


def _progress_bar(run: RunConfig, progress: Progress, ranks: Ranks) -> tqdm:
    # disable=None: no bar where stderr is not a terminal; `show` then prints a line each time instead.
    disable = None if ranks.is_main else True
    return tqdm(total=run.training.steps, initial=progress.step, unit="step", disable=disable, dynamic_ncols=True)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], str | None]]:
    """The name of the stop signal that came, if any: the loop then saves and ends.  A later Ctrl-C interrupts that."""
    received: list[tuple[str, float]] = []

    def handle(number: int, frame: Any) -> None:
        # Only a note: a print here could wait for ever, or meet the print that it interrupts.
        now = time.monotonic()
        if received and number == signal.SIGINT and now - received[0][1] > _ONE_PRESS_SECONDS:
            raise KeyboardInterrupt
        received.append((signal.Signals(number).name, now))

    handled = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
    # What was ignored when this program started stays so: `nohup` and shells' background jobs mean it.  SIGUSR1 has no
    # other meaning than ours, and job scripts ignore it until it can be answered.
    handled = [n for n in handled if n == signal.SIGUSR1 or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda: received[0][0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
