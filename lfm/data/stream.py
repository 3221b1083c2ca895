"""From a data set folder to the rows of each optimizer step, in an order that survives every restart."""

import shlex
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from lfm.config import Bytes, Config, CountOrZero, Depth, PathText, shipped_data_config
from lfm.data.batch import Batch
from lfm.data.bins import BIN_NAMES, BinReader
from lfm.data.cache import fetch
from lfm.data.format import INDEX_NAME, SPLITS, TOKENIZER_NAME, Split
from lfm.data.mix import LONGEST_CYCLE, MixedReader, Segment, cycle_parts
from lfm.data.reader import RowReader, ShardReader
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import exists, expanded

Windows = Literal["sequential", "random"]
Proportion = Annotated[float, Field(ge=0)]
# Keys of a mapping are text, as JSON writes them.
Step = Annotated[
    CountOrZero, BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key)
]


class StreamConfig(Config):
    """One of several data sets that are mixed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """In messages and in the names of its metrics."""
    path: PathText
    """As data.path."""
    remote: PathText | None = None
    """As data.remote."""
    windows: Windows = "sequential"
    """As data.windows."""
    proportion: Proportion | dict[Step, Proportion]
    """Its share of the rows, over the sum of all streams' numbers; or `{step: number, ...}`, each from that optimizer
    step on, and 0 before the first."""

    def proportion_at(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        if not isinstance(self.proportion, dict):
            return self.proportion
        begun = [begin for begin in self.proportion if begin <= step]
        return self.proportion[max(begun)] if begun else 0.0


class DataConfig(Config):
    """Where the rows come from."""

    path: PathText | None = None
    """Data set folder: shards, or train.bin and val.bin; with `remote`, the local folder that caches it."""
    remote: PathText | None = None
    """URL or path of the data set (s3://, gs://, hf://, ...) to fetch shards from; null reads `path` alone."""
    windows: Windows = "sequential"
    """Rows of train.bin: one window after the other, or windows at random places; val.bin is always sequential."""
    streams: tuple[StreamConfig, ...] = ()
    """Several data sets in given proportions, in place of `path`."""
    prefetch_threads: Annotated[int, Field(ge=0, le=16)] = 2
    """Threads that read ahead; 0 reads in the training loop."""
    prefetch_steps: Depth = 4
    """How many optimizer steps the threads read ahead."""
    fetch_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Longest time for one remote file; exceeding it ends the run with the file's name."""
    cache_limit_bytes: Bytes | None = None
    """Room for fetched shards of one split in `path`; those not opened for longest are removed.  null: no limit."""
    allow_smaller_tokenizer: bool = False
    """Accept a tokenizer with fewer ids than the model's vocab_size (the rest of the embedding is then untrained)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.streams:
            if self.path is None:
                raise ValueError("one of path and streams is needed; set data.path to a data set folder")
            return self
        if self.path is not None or self.remote is not None or self.windows != "sequential":
            raise ValueError(
                f"streams has {len(self.streams)} entries, so path={self.path}, remote={self.remote} and "
                f"windows={self.windows} have no meaning; set path=null and give the others in each stream"
            )
        names = [stream.name for stream in self.streams]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"streams has two entries of name={name}; give each another")
        for step in self.steps_of_change:
            if not sum(stream.proportion_at(step) for stream in self.streams) > 0:
                raise ValueError(f"the proportions of all streams are 0 from step {step} on; give one of them a part")
        return self

    @property
    def steps_of_change(self) -> list[int]:
        """Optimizer steps from which proportions hold, in order; 0 is the first."""
        given = [stream.proportion for stream in self.streams if isinstance(stream.proportion, dict)]
        return sorted({0}.union(*given))

    @property
    def sources(self) -> "dict[str, DataConfig]":
        """The config of each stream alone, by its name; of a single data set, which has no name, under ''."""
        if not self.streams:
            return {"": self}
        common = {key: value for key, value in self if key not in ("streams", "path", "remote", "windows")}
        return {s.name: DataConfig(path=s.path, remote=s.remote, windows=s.windows, **common) for s in self.streams}


def open_training(config: DataConfig, *, seq_length: int, vocab_size: int, rows_per_step: int) -> RowReader:
    """The training rows, mixed if there are several streams.

    `rows_per_step` says at which row a step begins that changes proportions.  Raises UserError as `open_split` does,
    and for streams of different tokenizers or columns.
    """
    readers = {
        name: open_split(source, "train", seq_length=seq_length, vocab_size=vocab_size)
        for name, source in config.sources.items()
    }
    if not config.streams:
        return readers[""]
    _check_tokenizers(config, readers)
    _check_columns(config, readers)
    segments = []
    for step in config.steps_of_change:
        weights = [stream.proportion_at(step) for stream in config.streams]
        parts = cycle_parts(weights)
        for stream, weight, part in zip(config.streams, weights, parts, strict=True):
            if weight > 0 and part == 0:
                raise UserError(
                    f"proportion={weight:g} of the stream {stream.name} is less than one row in {LONGEST_CYCLE} from "
                    f"step {step} on; raise it or set it to 0"
                )
        segments.append(Segment(step * rows_per_step, parts))
    return MixedReader(list(readers.values()), segments)


def open_validation(config: DataConfig, *, seq_length: int, vocab_size: int) -> dict[str, RowReader]:
    """The validation split of each stream by its name; of a single data set under ''."""
    readers = {
        name: open_split(source, "validation", seq_length=seq_length, vocab_size=vocab_size)
        for name, source in config.sources.items()
    }
    _check_tokenizers(config, readers)
    _check_columns(config, readers)
    return readers


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that made all ids, once the splits are open."""
    first = next(iter(config.sources.values()))
    assert first.path is not None
    return Tokenizer.from_file(expanded(first.path) / TOKENIZER_NAME)


def _check_tokenizers(config: DataConfig, readers: dict[str, RowReader]) -> None:
    """All streams must have the first one's."""
    first, *others = readers
    for name in others:
        if readers[name].index.tokenizer_sha256 != readers[first].index.tokenizer_sha256:
            raise UserError(
                f"the stream {name} ({config.sources[name].path}) is of another tokenizer than the stream {first} "
                f"({config.sources[first].path}); prepare one of them again with the other's tokenizer.json"
            )


def _check_columns(config: DataConfig, readers: dict[str, RowReader]) -> None:
    """All streams must have the first one's: a batch has one set of columns."""
    first, *others = readers

    def in_words(name: str) -> str:
        columns = ", ".join(f"{column} ({kind})" for column, kind in readers[name].columns.items())
        return f"the stream {name} ({config.sources[name].path}) has {columns or 'no column'} beside ids"

    for name in others:
        if readers[name].columns != readers[first].columns:
            raise UserError(
                f"{in_words(name)} and {in_words(first)}; mix streams of the same columns, such as by preparing both "
                "with the same `labels`"
            )


def open_split(config: DataConfig, split: Split, *, seq_length: int, vocab_size: int) -> RowReader:
    """The reader of one split of one data set, after checking that it fits the model and its tokenizer.json.

    Raises UserError for a missing folder, another seq_length, a vocabulary that does not fit, a foreign tokenizer.
    """
    assert config.path is not None, "streams are opened by open_training and open_validation"
    root = expanded(config.path)
    if any(exists(root / name) for name in BIN_NAMES.values()):
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
            "set data.allow_smaller_tokenizer=true if that is meant, which leaves the rest of the embedding untrained; "
            f"vocab_size={size} would be another model"
        )
    return reader


def _open_bins(config: DataConfig, root: Path, split: Split, seq_length: int) -> BinReader:
    if config.remote is not None:
        raise UserError(
            f"data.remote={config.remote} fetches shards, and data.path={config.path} holds .bin files, which are read "
            "in place; set data.remote=null or choose another data.path"
        )
    if any(exists(root / each / INDEX_NAME) for each in SPLITS):
        raise UserError(f"data.path={config.path} holds shards and .bin files; move one of the two elsewhere")
    return BinReader(root, split, seq_length=seq_length, windows=config.windows)


def _open_shards(config: DataConfig, root: Path, split: Split, seq_length: int) -> ShardReader:
    folder = root / split
    remote = config.remote.rstrip("/") if config.remote is not None else None
    if remote is None and not exists(folder / INDEX_NAME):
        missing = f"holds no {split}/{INDEX_NAME}" if exists(root) else "does not exist"
        shipped = shipped_data_config(str(config.path))
        what = f"--config {shipped}" if shipped is not None else f"FILE output={shlex.quote(str(config.path))}"
        raise UserError(f"data.path={config.path} {missing}; make it with `lfm prepare {what}`")
    if config.windows != "sequential":
        raise UserError(
            f"data.windows={config.windows} is for train.bin and data.path={config.path} holds shards, whose rows are "
            "fixed; set data.windows=sequential"
        )
    reader = ShardReader(
        folder,
        remote=remote and f"{remote}/{split}",
        fetch_timeout_seconds=config.fetch_timeout_seconds,
        cache_limit_bytes=config.cache_limit_bytes,
    )
    index = reader.index
    if index.seq_length != seq_length:
        raise UserError(
            f"{folder} has rows of seq_length={index.seq_length} but the run asks for seq_length={seq_length}; "
            "change the run's or prepare the data again with the run's"
        )
    if remote is not None and not exists(root / TOKENIZER_NAME):
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
        """The rows of the next optimizer step.

        Raises UserError for damaged data, at the step that needs it whatever the number of threads, and again at each
        further call: a step is never skipped.
        """
        start_time = time.perf_counter()
        if self._threads is None:
            batch = self._read(self.position)
        else:
            while len(self._ahead) < self._prefetch_steps:
                start = self.position + len(self._ahead) * self._rows_per_step
                self._ahead.append(self._threads.submit(lambda start: self._read(start).prepared(), start))
            batch = self._ahead[0].result()
            self._ahead.popleft()
        self.position += self._rows_per_step
        self.wait_seconds += time.perf_counter() - start_time
        return batch

    def state(self, position: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, from which `resume_row` finds the place again.

        `position`: of an earlier place, when what was handed out last was not used.
        """
        position = self.position if position is None else position
        return {"position": position, "seed": self._seed, "data_checksum": self._reader.identity(position)}

    def seek(self, row: int) -> None:
        """Go on at another position, as if the stream had begun there; what was read ahead is dropped."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self.position = row

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
    if state["data_checksum"] != reader.identity(state["position"]):
        if isinstance(reader, MixedReader):
            raise UserError(
                f"data.streams or their proportions before row {state['position']} of the run are not those that the "
                "checkpoint was trained on; restore them, with the data sets, and change later steps only"
            )
        raise UserError(
            f"{reader.folder} is not the data set the checkpoint was trained on, or is read in other rows; point "
            "data.path at that one and keep data.windows and seq_length"
        )
    return state["position"]
