"""One run of a set, in a process of its own: train it, measure it, and say that it is finished."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lfm.checkpoint.folder import whole_checkpoints
from lfm.data.stream import open_validation
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.plasticity import probes
from lfm.exits import command
from lfm.experiments.probes import LONGER_SEQ_LENGTH, VOCAB_SIZE, accuracy
from lfm.experiments.results import FINISHED
from lfm.files import exists, read_file, remove_tree, shown, write_durably
from lfm.inference.load import open_model
from lfm.models.liquidnn import MiniLiquidGPT
from lfm.talk import complain, say
from lfm.training.loop import train
from lfm.training.run import RunConfig


def in_own_process(config: str, log: str, gpu: str | None, measures: dict[str, Any]) -> None:
    """Of a fresh process: `work` on the run file `config`, all that it says going to the end of the file `log`.

    `gpu`: the only one that is visible, as CUDA_VISIBLE_DEVICES names it.  Ends with an exit code as commands do.
    """
    _end_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    sys.argv = ["lfm train", "--config", config]  # what environment.json tells
    command(work)(Path(config), **measures)


def work(config: Path, *, is_probe: bool, plasticity_words: int, keep_checkpoints: bool, shares_gpu: bool) -> None:
    """Train to the last step, or to a wish to stop; if it is trained, measure it and write what was found.

    `shares_gpu`: other runs are under way on the GPU, so that speeds are not this run's alone.  A loss that is no
    number is a finding too: that the rate is too high.
    """
    begun, run = time.monotonic(), RunConfig.load(config)
    found: dict[str, Any] = {"diverged": None}
    try:
        if train(run).step < run.training.steps:
            _sessions(run, begun, shares_gpu)
            return
    except NonFiniteError as error:
        found["diverged"] = str(error)
        say(f"diverged: {error}")
    if found["diverged"] is None and (is_probe or plasticity_words):
        found |= _measured(run, is_probe, plasticity_words)
    sessions = _sessions(run, begun, shares_gpu)
    found |= {"shares_gpu": any(shared for _, shared in sessions), "wall_seconds": sum(wall for wall, _ in sessions)}
    write_durably(run.folder / FINISHED, json.dumps(found).encode() + b"\n")
    if not keep_checkpoints:
        remove_tree(run.folder / "checkpoints")


_SESSIONS = TypeAdapter(list[tuple[float, bool]])


def _sessions(run: RunConfig, begun: float, shares_gpu: bool) -> list[tuple[float, bool]]:
    """Seconds of each session of the run that was not killed, and whether it shared its GPU; this one is added."""
    file = run.folder / "sessions.json"
    try:
        found = _SESSIONS.validate_json(read_file(file)) if exists(file) else []
    except UserError:
        raise
    except ValueError:
        complain(f"{shown(file)} is damaged; times of the run's earlier sessions are not counted")
        found = []
    found.append((time.monotonic() - begun, shares_gpu))
    write_durably(file, json.dumps(found).encode() + b"\n")
    return found


def _measured(run: RunConfig, is_probe: bool, plasticity_words: int) -> dict[str, Any]:
    [*_, newest] = whole_checkpoints(run.folder / "checkpoints")
    model, tokenizer, _ = open_model(newest, device="cuda" if run.device.type == "cuda" else "cpu")
    found: dict[str, Any] = {}
    if is_probe:
        longer = run.data.model_copy(update={"path": f"{run.data.path}/longer"})
        sizes = {"accuracy": (run.data, run.model.seq_length), "accuracy_longer": (longer, LONGER_SEQ_LENGTH)}
        for name, (data, seq_length) in sizes.items():
            [rows] = open_validation(data, seq_length=seq_length, vocab_size=VOCAB_SIZE).values()
            found[name] = accuracy(model, rows)
    elif isinstance(model, MiniLiquidGPT):
        words = probes(model, tokenizer, num_words=plasticity_words, seed=run.seed)
        found["plasticity"] = [asdict(word) for word in words]
    return found


def _end_with_parent() -> None:
    """SIGTERM, upon which a run saves and ends, when the process that made this one is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch the harness", daemon=True).start()
