"""Text to a data set: `python -m data_pipeline.prepare --config configs/data/NAME.yaml [key=value ...]`.

    find files -> read documents -> drop duplicates -> stop at the limits -> encode -> split -+-> pack -> shards
                                                                                              +-> train.bin, val.bin

Everything is written to a hidden folder beside the output, which takes the output's name when all of it is on the disk:
a killed run leaves nothing that looks like a data set, and running again starts over.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from tqdm import tqdm

from data_pipeline.dedup import drop_duplicates
from data_pipeline.encode import encode
from data_pipeline.pack import cut_to_row
from data_pipeline.sources import Document, InputFile, SourceConfig, find_files, read_documents
from data_pipeline.split import in_tokenizer_sample, split_of
from data_pipeline.write_bins import BinsWriter
from data_pipeline.write_shards import SplitWriter
from lfm.config import Config, parse_command_line
from lfm.data.bins import BinFile
from lfm.data.format import FORMAT_VERSION, SPLITS, TOKENIZER_NAME, Packing, Split, SplitIndex
from lfm.data.tokenizer import TiktokenPattern, Tokenizer, from_tiktoken, train_bpe
from lfm.errors import UserError, command
from lfm.files import held_alone, sync, write_durably

REPORT_NAME = "report.json"
FEWEST_TOKENS = 1000
"""Of a data set of .bin files: less is a wrong path rather than a corpus."""

_Counts = dict[str, Counter[str]]
_Splits = dict[Split, SplitIndex] | dict[Split, BinFile]


class TokenizerConfig(Config):
    train_vocab_size: PositiveInt | None = None
    """Train a byte-level BPE of this many entries on the training split; null: read `file`."""
    train_bytes: PositiveInt = 16_000_000
    """About how many bytes of text to train it on, taken evenly from all sources."""
    file: str | None = None
    """A tokenizer.json, or a .tiktoken rank file; null: train one."""
    tiktoken_pattern: TiktokenPattern | None = None
    """How a .tiktoken file's text is cut into words; null: recognise the published files, gpt2 for others."""

    @model_validator(mode="after")
    def _trained_or_read(self) -> "TokenizerConfig":
        if (self.train_vocab_size is None) == (self.file is None):
            raise ValueError(
                f"train_vocab_size={self.train_vocab_size} and file={self.file}: "
                "set exactly one of the two and make the other null"
            )
        return self


class PrepareConfig(Config):
    output: str
    """Folder of the data set: tokenizer.json, both splits, validation.txt and report.json."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where text comes from; read in this order."""
    tokenizer: TokenizerConfig
    format: Literal["mds", "bins"] = "mds"
    """mds: rows in shards, documents apart; bins: all ids end to end in train.bin and val.bin."""
    seq_length: Annotated[int, Field(ge=2)] | None = None
    """Ids in a row of shards; the run that trains on it uses the same.  null for bins: the run cuts the rows."""
    packing: Packing = "greedy"
    """greedy: shards' rows are full, documents go on in the next row; one_document: each row is one, cut or padded."""
    separator: Literal["eod", "none"] = "eod"
    """What follows each document: its end-of-document id, or, in bins only, nothing."""
    validation: Literal["hash", "tail"] = "hash"
    """Which text is held out: documents chosen by a hash of their text, or, in bins only, the last ids of all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents (hash) or of the ids (tail) in the validation split."""
    shard_bytes: PositiveInt = 1 << 26
    """Largest size of an uncompressed shard file."""
    compression: Literal["zstd"] | None = None
    """null is best on a shared file system; zstd suits shards that are fetched from a remote."""
    max_bytes: PositiveInt | None = None
    """Stop after this many bytes of text, duplicates not counted; null: take all."""
    max_documents: PositiveInt | None = None
    """Stop after this many documents, duplicates not counted; null: take all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the choice of validation documents and of the tokenizer's training text."""
    overwrite: bool = False
    """Prepare anew and replace the data set that `output` holds."""

    @model_validator(mode="after")
    def _keys_of_the_format(self) -> "PrepareConfig":
        if self.format == "mds":
            if self.seq_length is None:
                raise ValueError("seq_length=null: rows of shards need a length; set seq_length, or format=bins")
            if (self.separator, self.validation) != ("eod", "hash"):
                raise ValueError(
                    f"separator={self.separator} and validation={self.validation}: shards keep documents apart; "
                    "set separator=eod and validation=hash, or format=bins"
                )
        elif (self.seq_length, self.packing, self.compression) != (None, "greedy", None):
            raise ValueError(
                f"seq_length={self.seq_length}, packing={self.packing} and compression={self.compression}: .bin files "
                "have no rows and no shards; remove these keys, or set format=mds"
            )
        elif self.validation == "tail" and self.tokenizer.file is None:
            raise ValueError(
                "tokenizer.file=null: with validation=tail the held-out text is known only after encoding, so that a "
                "tokenizer trained here would see it; set tokenizer.file, or validation=hash"
            )
        return self


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the data set unless it is there already; returns the content of its report.json.

    Raises UserError if `output` holds something else, a source or the tokenizer cannot be used, or a split stays empty.
    """
    started = time.monotonic()
    output = Path(config.output).expanduser().absolute()
    found: Counter[str] = Counter()
    files = find_files(config.sources, found)
    fingerprint = _fingerprint(config, files)
    report = _finished_report(output)
    if report is not None and report["fingerprint"] == fingerprint and not config.overwrite:
        print(f"{config.output} is already prepared: same config, same inputs")
        return report

    partial = output.with_name(f".{output.name}.partial")
    with held_alone(
        output.with_name(f".{output.name}.lock"),
        unwritable=f"output={config.output} cannot be made; choose another output",
        taken=f"another process is preparing output={config.output}; wait for it or choose another",
    ):
        _check_replaceable(output, config)
        shutil.rmtree(partial, ignore_errors=True)  # a killed run's
        partial.mkdir()
        try:
            report = {"fingerprint": fingerprint, **_build(config, files, found, partial)}
            write_durably(partial / REPORT_NAME, json.dumps(report, indent=2).encode())
            _publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(_in_words(report))
    print(f"{config.output} is ready, after {time.monotonic() - started:.1f} s")
    return report


def _build(config: PrepareConfig, files: Sequence[InputFile], found: Counter[str], folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and both splits into `folder`; returns the report."""
    tokenizer, tokenizer_text_bytes = _make_tokenizer(config, files)
    tokenizer.save(folder / TOKENIZER_NAME)
    stages = {"sources": Counter(found), **{name: Counter() for name in ("dedup", "limit", "encode")}}
    encoded = encode(_documents(config, files, stages), tokenizer, stages["encode"], separator=config.separator)
    write = _write_bins if config.format == "bins" else _write_shards
    splits = write(config, tokenizer, _with_bar(encoded, _expected_bytes(config, files)), stages, folder)
    for split, counts in splits.items():
        if counts.num_documents == 0:
            raise UserError(
                f"validation_fraction={config.validation_fraction} of {stages['limit']['documents']} documents leaves "
                f"the {split} split empty; change it or add text"
            )
    sources = stages["sources"]
    files_left_out = sum(sources[f"files_{why}"] for why in ("repeated", "too_large", "unreadable", "not_utf8"))
    sources["files_not_reached"] = sources["files_found"] - sources["files_read"] - files_left_out
    _check_sums(stages, splits)
    return {
        "config": _lasting(config),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "trained_on_bytes": tokenizer_text_bytes,
        },
        "stages": {name: dict(sorted(counts.items())) for name, counts in stages.items()},
        "splits": {split: counts.model_dump(exclude={"xxh64"}) for split, counts in splits.items()},
    }


def _write_shards(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    encoded: Iterable[tuple[Document, np.ndarray]],
    stages: _Counts,
    folder: Path,
) -> dict[Split, SplitIndex]:
    assert config.seq_length is not None
    writers: dict[Split, SplitWriter] = {
        split: SplitWriter(
            folder,
            split,
            tokenizer,
            seq_length=config.seq_length,
            packing=config.packing,
            shard_bytes=config.shard_bytes,
            compression=config.compression,
            keep_text=split == "validation",
        )
        for split in SPLITS
    }
    if config.packing == "one_document":
        stages["pack"] = Counter(documents_cut=0, tokens_cut=0, bytes_cut=0)
    for document, ids in encoded:
        split = _split(config, document)
        if config.packing == "one_document":
            document, ids = cut_to_row(
                document, ids, seq_length=config.seq_length, tokenizer=tokenizer, counts=stages["pack"]
            )
        writers[split].add(document, ids)
    return {split: writer.finish() for split, writer in writers.items()}


def _write_bins(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    encoded: Iterable[tuple[Document, np.ndarray]],
    stages: _Counts,
    folder: Path,
) -> dict[Split, BinFile]:
    tail = config.validation_fraction if config.validation == "tail" else None
    with BinsWriter(folder, tokenizer, separator=config.separator, tail=tail) as writer:
        for document, ids in encoded:
            writer.add(_split(config, document), document, ids)
    num_tokens = stages["encode"]["tokens"]
    if num_tokens < FEWEST_TOKENS:
        raise UserError(
            f"the text of all sources is {num_tokens} ids, fewer than the {FEWEST_TOKENS} that format=bins needs; "
            "add text"
        )
    return writer.finish()


def _with_bar(encoded: Iterable[tuple[Document, np.ndarray]], num_bytes: int) -> Iterator[tuple[Document, np.ndarray]]:
    """The same, while a progress bar shows how much of `num_bytes` of text has passed."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="encode", disable=None) as bar:
        for document, ids in encoded:
            yield document, ids
            bar.update(document.num_bytes)


def _documents(config: PrepareConfig, files: Sequence[InputFile], stages: _Counts) -> Iterator[Document]:
    """All documents of both splits, in order."""
    documents = drop_duplicates(read_documents(files, stages["sources"]), stages["dedup"])
    return _stop_at(config, documents, stages["limit"])


def _stop_at(config: PrepareConfig, documents: Iterable[Document], counts: Counter[str]) -> Iterator[Document]:
    for document in documents:
        too_long = config.max_bytes is not None and counts["bytes"] + document.num_bytes > config.max_bytes
        if too_long or counts["documents"] == config.max_documents:
            counts["over_limit"] += 1
            return
        counts["documents"] += 1
        counts["bytes"] += document.num_bytes
        yield document


def _make_tokenizer(config: PrepareConfig, files: Sequence[InputFile]) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many bytes of text it was trained on (0 if it was read from a file)."""
    wanted = config.tokenizer
    if wanted.file is not None:
        path = Path(wanted.file).expanduser()
        if path.suffix == ".tiktoken":
            return from_tiktoken(path, wanted.tiktoken_pattern), 0
        return Tokenizer.from_file(path), 0
    assert wanted.train_vocab_size is not None
    counts: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        return _documents(config, files, {"sources": Counter(), "dedup": Counter(), "limit": Counter()})

    # How much text max_documents leaves shows only by reading it.
    exact = config.max_documents is not None
    total = sum(document.num_bytes for document in documents()) if exact else _expected_bytes(config, files)
    fraction = wanted.train_bytes / max(1, total)

    def sample() -> Iterator[str]:
        for document in documents():
            is_training = _split(config, document) == "train"
            if is_training and in_tokenizer_sample(document.text, seed=config.seed, fraction=fraction):
                counts["bytes"] += document.num_bytes
                yield document.text

    return train_bpe(sample(), wanted.train_vocab_size), counts["bytes"]


def _split(config: PrepareConfig, document: Document) -> Split:
    return split_of(document.text, seed=config.seed, validation_fraction=config.validation_fraction)


def _expected_bytes(config: PrepareConfig, files: Sequence[InputFile]) -> int:
    """The most text there can be, for the progress bar and for sampling."""
    total = sum(file.num_bytes for file in files)
    return total if config.max_bytes is None else min(total, config.max_bytes)


def _check_sums(stages: _Counts, splits: _Splits) -> None:
    """What goes into a stage comes out of it or is counted as left out."""
    sources, dedup, limit, encoded = (stages[name] for name in ("sources", "dedup", "limit", "encode"))
    cut = stages.get("pack", Counter())
    assert sources["files_not_reached"] == 0 or limit["over_limit"] == 1, sources
    assert sources["documents"] == dedup["documents"] + dedup["duplicates"], stages
    assert sources["bytes"] == dedup["bytes"] + dedup["duplicate_bytes"], stages
    assert dedup["documents"] == limit["documents"] + limit["over_limit"], stages
    assert limit["documents"] == encoded["documents"], stages
    assert encoded["tokens"] == sum(split.num_tokens for split in splits.values()) + cut["tokens_cut"], (stages, splits)
    for split in splits.values():
        if isinstance(split, SplitIndex):
            assert split.num_rows * split.seq_length == split.num_tokens + split.num_padding, split
    if all(split.num_documents is not None for split in splits.values()):
        assert limit["documents"] == sum(split.num_documents or 0 for split in splits.values()), (stages, splits)
        text_bytes = sum(split.text_bytes or 0 for split in splits.values())
        assert limit["bytes"] == text_bytes + cut["bytes_cut"], (stages, splits)


def _in_words(report: dict[str, Any]) -> str:
    lines = []
    for name, counts in report["stages"].items():
        lines.append(f"{name:>10}: " + ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items()))
    for split, counts in report["splits"].items():
        parts = [f"{counts['num_tokens']:,} tokens"]
        if counts["num_documents"] is not None:
            each = counts["text_bytes"] / max(1, counts["num_tokens"])
            parts = [
                f"{counts['num_documents']:,} documents",
                f"{counts['text_bytes']:,} bytes of text",
                f"{parts[0]} ({each:.2f} bytes each)",
            ]
        if "num_rows" in counts:
            parts.append(
                f"{counts['num_rows']:,} rows of {counts['seq_length']} with {counts['num_padding']:,} pad ids"
            )
        lines.append(f"{split:>10}: " + ", ".join(parts))
    return "\n".join(lines)


def _lasting(config: PrepareConfig) -> dict[str, Any]:
    """The part of the config that decides the content."""
    return config.model_dump(mode="json", exclude={"output", "overwrite"})


def _fingerprint(config: PrepareConfig, files: Sequence[InputFile]) -> str:
    """Equal for equal configs over unchanged inputs; the inputs count by path, size and time, without reading them."""
    inputs = [(str(file.path), file.num_bytes, file.mtime_ns) for file in files]
    if config.tokenizer.file is not None:
        path = Path(config.tokenizer.file).expanduser()
        if path.exists():  # if not, reading it says so
            inputs.append((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns))
    content = json.dumps([FORMAT_VERSION, _lasting(config), inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _finished_report(output: Path) -> dict[str, Any] | None:
    """The report of the data set in `output`; None if that is no data set."""
    try:
        report = json.loads((output / REPORT_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "fingerprint" in report else None


def _check_replaceable(output: Path, config: PrepareConfig) -> None:
    is_data_set = _finished_report(output) is not None
    if is_data_set and not config.overwrite:
        raise UserError(
            f"output={config.output} holds a data set of another config or of inputs that have changed since; "
            "choose another output, or set overwrite=true to replace it"
        )
    if not is_data_set and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output={config.output} exists and is no data set of this program; choose another output")


def _publish(partial: Path, output: Path) -> None:
    """Give `partial`, whose files are on the disk, the name `output`."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


@command
def main(argv: Sequence[str] | None = None) -> None:
    config, _ = parse_command_line(PrepareConfig, "Prepare a data set: text to tokenized shards.", argv)
    assert isinstance(config, PrepareConfig)
    prepare(config)


if __name__ == "__main__":
    main()
