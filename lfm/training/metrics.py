"""What a run writes for people: metrics.jsonl, TensorBoard, wandb, the loss plot.  A failing logger never stops it."""

import contextlib
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lfm.config import Config, Count, CountOrZero
from lfm.errors import UserError
from lfm.files import exists, read_file, read_lines, shown, write_durably
from lfm.models.registry import ModelConfig
from lfm.talk import say, warn
from lfm.training.engine import Engine, StepResult
from lfm.training.metrics_file import parse_record

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}
"""Dense bf16 FLOP/s (T4, which has none: float16) by words of a GPU's name; MFU is a share of it.

From the vendors' data sheets, where half of what they give with sparsity; of RTX cards from NVIDIA's Ada and Blackwell
architecture papers, summing in float32.
"""
_NOT_THE_CHIP = {"Laptop", "MIG", "D", "Max"}
"""Words by which a name means a smaller chip, or a part of one."""


class LoggingConfig(Config):
    every_steps: Count = 10
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; needs `pip install 'lfm-training[wandb]'`."""
    wandb_project: str = "lfm"
    steps_per_epoch: CountOrZero = 0
    """Write loss_log.csv too, counting this many steps as an epoch; 0: no such file."""
    print_config: bool = False
    """Print the resolved configuration as JSON when training starts."""


@dataclass(frozen=True)
class _Writer:
    """Where records go."""

    write: Callable[[dict[str, Any]], None]
    truncate: Callable[[int], None] = lambda step: None
    close: Callable[[], Any] = lambda: None


class Metrics:
    """Writers of one run folder, used as a context; each is dropped, with one message, when it fails."""

    def __init__(
        self, config: LoggingConfig, folder: Path, *, name: str, resumed_step: int, run_config: dict[str, Any]
    ) -> None:
        self.file = folder / "metrics.jsonl"
        self.folder = folder
        self._writers: dict[str, _Writer] = {}
        self._is_drawn = True
        self._open("metrics.jsonl", self._open_jsonl)
        if config.steps_per_epoch:
            self._open("loss_log.csv", lambda: self._open_csv(config.steps_per_epoch))
        if config.tensorboard:
            self._open("tensorboard", lambda: self._open_tensorboard(resumed_step, run_config))
        if config.wandb != "off":
            self._open("wandb", lambda: self._open_wandb(config, name, run_config))
        self.truncate(resumed_step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        self._each(lambda writer: writer.close())
        self._writers.clear()

    def _open(self, name: str, opener: Callable[[], _Writer]) -> None:
        try:
            self._writers[name] = opener()
        except Exception as error:  # a logger's failure, whatever it is, must not stop training
            _complain(name, error)

    def _each(self, work: Callable[[_Writer], Any]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                work(writer)
            except Exception as error:
                _complain(name, error)
                del self._writers[name]
                with contextlib.suppress(Exception):
                    writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it holds `step` and what was measured."""
        self._each(lambda writer: writer.write(record))

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`: it happens again.  wandb keeps the first record of a step."""
        self._each(lambda writer: writer.truncate(step))

    def plot(self) -> None:
        """Redraw plots/loss.png from metrics.jsonl."""
        try:
            from lfm.training.plots import plot_loss

            plot_loss(self.file, self.folder / "plots" / "loss.png")
            self._is_drawn = True
        except Exception as error:
            if self._is_drawn:
                warn(f"warning: plots/loss.png is not drawn: {_cause(error)}")
            self._is_drawn = False

    def sync(self) -> None:
        """What was written so far is on the disk, before a checkpoint is that goes on after it."""
        with contextlib.suppress(OSError), open(self.file, "rb") as stream:  # a failing logger never stops training
            os.fsync(stream.fileno())

    def _open_jsonl(self) -> _Writer:
        def truncate(step: int) -> None:
            if exists(self.file):
                kept = [line for line, record in read_lines(self.file, parse_record) if record["step"] <= step]
                write_durably(self.file, "".join(kept).encode())

        def write(record: dict[str, Any]) -> None:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

        return _Writer(write, truncate)

    def _open_csv(self, steps_per_epoch: int) -> _Writer:
        file = self.folder / "loss_log.csv"
        columns = "global_step,epoch,step_in_epoch,loss,lr,timestamp"

        def truncate(last: int) -> None:
            kept = []
            if exists(file):
                lines = read_lines(file, lambda line: -1 if line == columns else int(line.partition(",")[0]))
                kept = [line for line, step in lines if 0 <= step <= last]
            write_durably(file, "".join([columns + "\n", *kept]).encode())

        def write(record: dict[str, Any]) -> None:
            if "mean_cross_entropy" not in record:
                return
            epoch, step = divmod(record["step"] - 1, steps_per_epoch)
            values = [record["step"], epoch + 1, step + 1, record["mean_cross_entropy"], record["next_lr"], time.time()]
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(",".join(str(value) for value in values) + "\n")

        return _Writer(write, truncate)

    def _open_tensorboard(self, resumed_step: int, run_config: dict[str, Any]) -> _Writer:
        # Not its SummaryWriter, whose thread prints the traceback of a full disk and tells nobody.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        from lfm.training.tensorboard_config import as_hparams, as_text

        folder = self.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        file = open(folder / name, "wb")
        records = RecordWriter(file)

        def write_event(step: int, **content: Any) -> None:
            records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

        def write(record: dict[str, Any]) -> None:
            values = [Summary.Value(tag=key, simple_value=value) for key, value in _scalars(record).items()]
            write_event(record["step"], summary=Summary(value=values))
            file.flush()

        def truncate(step: int) -> None:
            # Its readers drop what was written before from this step on.
            write_event(step + 1, session_log=SessionLog(status=SessionLog.START))
            file.flush()

        write_event(resumed_step + 1, file_version="brain.Event:2")
        write_event(resumed_step, summary=Summary(value=[as_text(run_config), as_hparams(run_config)]))
        return _Writer(write, truncate, file.close)

    def _open_wandb(self, config: LoggingConfig, name: str, run_config: dict[str, Any]) -> _Writer:
        try:
            import wandb
        except ImportError:
            raise ImportError("wandb is not installed: pip install 'lfm-training[wandb]'") from None
        run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=_wandb_id(self.folder, name),
            resume="allow",
            dir=str(self.folder),
            mode=config.wandb if config.wandb == "online" else "offline",
            config=run_config,
            allow_val_change=True,  # a run may go on with other settings
        )
        return _Writer(lambda record: run.log(_scalars(record), step=record["step"]), close=run.finish)


def _wandb_id(folder: Path, name: str) -> str:
    """The same at every start of the run of this folder, and no other's: drawn once, and kept there."""
    file = folder / "wandb_id.txt"
    if not exists(file):
        write_durably(file, f"{re.sub('[^A-Za-z0-9_-]', '-', name)[:64]}-{secrets.token_hex(4)}\n".encode())
    found = read_file(file).decode(errors="replace").strip()
    if not re.fullmatch("[A-Za-z0-9_-]{1,128}", found):
        raise UserError(f"{shown(file)} holds no id of a run; remove it, and the run begins anew there")
    return found


def _cause(error: Exception) -> str:
    """A sentence where there is one, else the kind of error too: what other packages raise may say little."""
    return str(error) if isinstance(error, UserError) else repr(error)


def _complain(name: str, error: Exception) -> None:
    warn(f"warning: logging to {name} is off from now on: {_cause(error)}")


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """The record's numbers by slash-joined name; lists of lists (per-expert load) become one number an entry."""
    found: dict[str, float] = {}

    def visit(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, item in value.items():
                visit(f"{key}/{inner}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(f"{key}/{index}", item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value

    for key, value in record.items():
        if key != "step":
            visit(key, value)
    return found


def training_record(result: StepResult) -> dict[str, Any]:
    """What one optimizer step contributes to metrics.jsonl, besides speed and memory; what the family has of it."""
    record: dict[str, Any] = {"loss": result.loss, **result.terms}
    for name, values in result.measured.items():
        some = next(iter(values.values()))
        if isinstance(some, list):  # counts of several kinds: the shares of each, and how unequal they are
            record[name] = [[count / max(1, sum(counts)) for count in counts] for counts in values.values()]
            imbalance = (max(counts) * len(counts) / max(1, sum(counts)) for counts in values.values())
            record[f"{name}_max_over_mean"] = max(imbalance)
        elif isinstance(some, int):
            record[name] = sum(values.values())
        else:
            record[name] = {str(layer): value for layer, value in values.items()}
    return record


def peak_flops(device_name: str | None) -> float | None:
    """Data-sheet FLOP/s of a GPU by its name; None where there is no figure, and then there is no MFU."""
    words = set(re.split(r"[\s-]+", device_name or ""))
    known = [chip for chip in PEAK_FLOPS if words.issuperset(chip.split()) and not words & _NOT_THE_CHIP]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class Speed:
    """Tokens/s and MFU over the window since the last measurement, memory, ETA; validation and saving are left out."""

    def __init__(self, model: ModelConfig, engine: Engine, world_size: int) -> None:
        self.model, self.engine, self.world_size = model, engine, world_size
        device = engine.device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._is_new = True
        self.restart()

    @property
    def is_new(self) -> bool:
        """Whether nothing was added yet."""
        return self._is_new

    def restart(self) -> None:
        self.start, self.tokens, self.pairs = self.engine.synchronize(), 0, 0

    def add(self, tokens: int, attended_pairs: int) -> None:
        self.tokens += tokens
        self.pairs += attended_pairs
        self._is_new = False

    def measure(self, remaining_tokens: int, memory_bytes: int) -> dict[str, Any]:
        """Of the whole run, but MFU and TFLOP/s of one process; `memory_bytes` is the fullest process's."""
        seconds = self.engine.synchronize() - self.start
        if not self.tokens:
            return {}
        rate = self.tokens / seconds
        flops = self.model.flops_per_token(attended=self.pairs / self.tokens) * rate / self.world_size
        found = {
            "tokens_per_second": rate,
            "tokens_per_second_per_process": rate / self.world_size,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "memory_gib": memory_bytes / 2**30,
            "eta_seconds": remaining_tokens / rate,
            "time": time.time(),
        }
        self.restart()
        return found


def show(bar: tqdm, record: dict[str, Any], world_size: int) -> None:
    """Put one logged step on the progress bar; where there is no terminal for a bar, print it as a line."""
    each = f" ({record['tokens_per_second_per_process']:,.0f} each)" if world_size > 1 and "mfu" in record else ""
    speed = f"{record['tokens_per_second']:,.0f} tok/s{each}" if "tokens_per_second" in record else ""
    mfu = f"  MFU {record['mfu']:.1%}" if record.get("mfu") else ""
    memory = f"  {record['memory_gib']:.1f} GiB" if "memory_gib" in record else ""
    text = f"loss {record['cross_entropy']:.4f}  norm {record.get('grad_norm', math.inf):.2f}  {speed}{mfu}{memory}"
    if record.get("reservoir_fallbacks"):
        text += f"  {record['reservoir_fallbacks']} sequential fallbacks"
    if record.get("skipped_updates"):
        text += f"  {record['skipped_updates']} updates skipped"
    bar.set_postfix_str(text)
    if bar.disable:
        say(f"step {record['step']}/{bar.total}  {text}  ETA {_minutes(record.get('eta_seconds'))}")


def _minutes(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 60:.1f} min"
