"""From a data set folder to the rows of each optimizer step, in an order that survives every restart."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt

from lfm.config import Config
from lfm.data.bins import BIN_NAMES, BinReader
from lfm.data.cache import fetch
from lfm.data.format import INDEX_NAME, SPLITS, TOKENIZER_NAME, Split
from lfm.data.reader import RowReader, ShardReader
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError

Batch = tuple[torch.Tensor, list[list[int]]]


class DataConfig(Config):
    """Where the rows come from."""

    path: str
    """Data set folder: shards, or train.bin and val.bin; with `remote`, the local folder that caches it."""
    remote: str | None = None
    """URL or path of the data set (s3://, gs://, hf://, ...) to fetch shards from; null reads `path` alone."""
    windows: Literal["sequential", "random"] = "sequential"
    """Rows of train.bin: one window after the other, or windows at random places; val.bin is always sequential."""
    prefetch_threads: Annotated[int, Field(ge=0, le=16)] = 2
    """Threads that read ahead; 0 reads in the training loop."""
    prefetch_steps: PositiveInt = 4
    """How many optimizer steps the threads read ahead."""
    fetch_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Longest time for one remote file; exceeding it ends the run with the file's name."""
    allow_smaller_tokenizer: bool = False
    """Accept a tokenizer with fewer ids than the model's vocab_size (the rest of the embedding is then untrained)."""


def open_split(config: DataConfig, split: Split, *, seq_length: int, vocab_size: int) -> RowReader:
    """The reader of one split, after checking that it fits the model and that its tokenizer.json made its ids.

    Raises UserError for a missing folder, another seq_length, a vocabulary that does not fit, a foreign tokenizer.
    """
    root = Path(config.path).expanduser()
    if any((root / name).exists() for name in BIN_NAMES.values()):
        reader = _open_bins(config, root, split, seq_length)
    else:
        reader = _open_shards(config, root, split, seq_length)
    size = reader.index.vocab_size
    if size > vocab_size:
        raise UserError(
            f"the tokenizer of {root} has {size} ids, more than the model's vocab_size={vocab_size}; "
            f"set vocab_size={size} or prepare the data with a smaller tokenizer"
        )
    if size < vocab_size and not config.allow_smaller_tokenizer:
        raise UserError(
            f"the tokenizer of {root} has {size} ids, fewer than the model's vocab_size={vocab_size}; "
            f"set vocab_size={size}, or data.allow_smaller_tokenizer=true if that is meant"
        )
    return reader


def _open_bins(config: DataConfig, root: Path, split: Split, seq_length: int) -> BinReader:
    if config.remote is not None:
        raise UserError(
            f"data.remote={config.remote} fetches shards, and data.path={config.path} holds .bin files, which are read "
            "in place; set data.remote=null or choose another data.path"
        )
    if any((root / each / INDEX_NAME).exists() for each in SPLITS):
        raise UserError(f"data.path={config.path} holds shards and .bin files; move one of the two elsewhere")
    return BinReader(root, split, seq_length=seq_length, windows=config.windows)


def _open_shards(config: DataConfig, root: Path, split: Split, seq_length: int) -> ShardReader:
    folder = root / split
    remote = config.remote.rstrip("/") if config.remote is not None else None
    if remote is None and not (folder / INDEX_NAME).exists():
        missing = f"holds no {split} split" if root.exists() else "does not exist"
        raise UserError(
            f"data.path={config.path} {missing}; make it with "
            f"`python -m data_pipeline.prepare --config configs/data/NAME.yaml output={config.path}`"
        )
    if config.windows != "sequential":
        raise UserError(
            f"data.windows={config.windows} is for train.bin and data.path={config.path} holds shards, whose rows are "
            "fixed; set data.windows=sequential"
        )
    reader = ShardReader(
        folder, remote=remote and f"{remote}/{split}", fetch_timeout_seconds=config.fetch_timeout_seconds
    )
    index = reader.index
    if index.seq_length != seq_length:
        raise UserError(
            f"{folder} has rows of seq_length={index.seq_length} but the run asks for seq_length={seq_length}; "
            "change the run's or prepare the data again with the run's"
        )
    if remote is not None and not (root / TOKENIZER_NAME).exists():
        fetch(f"{remote}/{TOKENIZER_NAME}", root / TOKENIZER_NAME, config.fetch_timeout_seconds)
    if Tokenizer.from_file(root / TOKENIZER_NAME).sha256 != index.tokenizer_sha256:
        raise UserError(
            f"the shards in {folder} are of another tokenizer than {root / TOKENIZER_NAME}; "
            "restore that file or prepare the data set again with overwrite=true"
        )
    return reader


class BatchStream:
    """Hands out the rows of one optimizer step after the other, in the reader's order, reading ahead in threads.

    Epochs follow each other without a seam: a step may hold the last rows of one and the first of the next.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        seed: int,
        rows_per_step: int,
        start_row: int = 0,
        take: slice = slice(None),
        prefetch_threads: int = 0,
        prefetch_steps: int = 4,
    ) -> None:
        """`start_row` is the global sample position to begin at; `take` selects the rows of each step that this process
        needs (a data-parallel rank's share), and does not change what a step is.
        """
        self.position = start_row
        """Rows handed out so far by all steps, over all epochs; those read ahead do not count."""
        self.wait_seconds = 0.0
        """Time that `next` has taken."""
        self._reader = reader
        self._seed = seed
        self._rows_per_step = rows_per_step
        self._take = take
        self._prefetch_steps = prefetch_steps
        self._ahead: deque[Future[Batch]] = deque()
        self._threads = ThreadPoolExecutor(prefetch_threads, "read rows") if prefetch_threads > 0 else None

    def next(self) -> Batch:
        """Ids, int64 `[R, T]`, and the document lengths of each row, for the next optimizer step.

        Raises UserError for damaged data, at the step that needs it whatever the number of threads, and again at each
        further call: a step is never skipped.
        """
        start_time = time.perf_counter()
        if self._threads is None:
            batch = self._read(self.position)
        else:
            while len(self._ahead) < self._prefetch_steps:
                start = self.position + len(self._ahead) * self._rows_per_step
                self._ahead.append(self._threads.submit(self._read, start))
            batch = self._ahead[0].result()
            self._ahead.popleft()
        self.position += self._rows_per_step
        self.wait_seconds += time.perf_counter() - start_time
        return batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, from which `resume_row` finds the place again."""
        return {"position": self.position, "seed": self._seed, "data_checksum": self._reader.index.checksum}

    def close(self) -> None:
        """Stop reading ahead, after the reads under way.  The stream cannot be used afterwards."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _read(self, start: int) -> Batch:
        return self._reader.read(self._reader.order(self._seed, start, self._rows_per_step)[self._take])


def resume_row(state: dict[str, Any], reader: RowReader, *, seed: int) -> int:
    """The `start_row` that continues a stream from its `state`; the number of rows per step may have changed.

    Raises UserError if the seed or the data set is another, because the order would be another.
    """
    if state["seed"] != seed:
        raise UserError(f"the checkpoint's data order has seed={state['seed']}, the run has seed={seed}; use the same")
    if state["data_checksum"] != reader.index.checksum:
        raise UserError(
            f"{reader.folder} is not the data set the checkpoint was trained on, or is read in other rows; point "
            "data.path at that one and keep data.windows and seq_length"
        )
    return state["position"]
