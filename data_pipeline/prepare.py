"""Text to a data set: `python -m data_pipeline.prepare --config configs/data/NAME.yaml [key=value ...]`.

    find files -> read documents -> drop duplicates -> stop at max_bytes -> encode -> split -> pack -> shards

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

from pydantic import Field, PositiveInt, model_validator
from tqdm import tqdm

from data_pipeline.dedup import drop_duplicates
from data_pipeline.encode import encode
from data_pipeline.sources import Document, InputFile, SourceConfig, find_files, read_documents
from data_pipeline.split import in_tokenizer_sample, split_of
from data_pipeline.write_shards import SplitWriter
from lfm.config import Config, parse_command_line
from lfm.data.format import FORMAT_VERSION, SPLITS, TOKENIZER_NAME, SplitIndex
from lfm.data.tokenizer import TiktokenPattern, Tokenizer, from_tiktoken, train_bpe
from lfm.errors import UserError, command
from lfm.files import held_alone, sync, write_durably

REPORT_NAME = "report.json"


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
    """Folder of the data set: tokenizer.json, train/, validation/, validation.txt and report.json."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where text comes from; read in this order."""
    tokenizer: TokenizerConfig
    seq_length: Annotated[int, Field(ge=2)]
    """Ids in a row; the run that trains on it uses the same."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents in the validation split, chosen by a hash of their text."""
    shard_bytes: PositiveInt = 1 << 26
    """Largest size of an uncompressed shard file."""
    compression: Literal["zstd"] | None = None
    """null is best on a shared file system; zstd suits shards that are fetched from a remote."""
    max_bytes: PositiveInt | None = None
    """Stop after this many bytes of text, duplicates not counted; null: take all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the choice of validation documents and of the tokenizer's training text."""
    overwrite: bool = False
    """Prepare anew and replace the data set that `output` holds."""


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
    writers = {
        split: SplitWriter(
            folder,
            split,
            tokenizer,
            seq_length=config.seq_length,
            shard_bytes=config.shard_bytes,
            compression=config.compression,
            keep_text=split == "validation",
        )
        for split in SPLITS
    }
    stages: dict[str, Counter[str]] = {"sources": Counter(found), "dedup": Counter(), "limit": Counter()}
    documents = _documents(config, files, stages)
    with tqdm(total=_expected_bytes(config, files), unit="B", unit_scale=True, desc="encode", disable=None) as bar:
        for document, ids in encode(documents, tokenizer):
            split = split_of(document.text, seed=config.seed, validation_fraction=config.validation_fraction)
            writers[split].add(document, ids)
            bar.update(document.num_bytes)
    indices = {split: writer.finish() for split, writer in writers.items()}
    for split, index in indices.items():
        if index.num_documents == 0:
            raise UserError(
                f"validation_fraction={config.validation_fraction} of {stages['limit']['documents']} documents leaves "
                f"the {split} split empty; change it or add text"
            )
    sources = stages["sources"]
    files_left_out = sum(sources[f"files_{why}"] for why in ("repeated", "too_large", "unreadable", "not_utf8"))
    sources["files_not_reached"] = sources["files_found"] - sources["files_read"] - files_left_out
    _check_sums(stages, indices)
    return {
        "config": _lasting(config),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "trained_on_bytes": tokenizer_text_bytes,
        },
        "stages": {name: dict(sorted(counts.items())) for name, counts in stages.items()},
        "splits": {split: index.model_dump() for split, index in indices.items()},
    }


def _documents(
    config: PrepareConfig, files: Sequence[InputFile], stages: dict[str, Counter[str]]
) -> Iterator[Document]:
    """All documents of both splits, in order."""
    documents = drop_duplicates(read_documents(files, stages["sources"]), stages["dedup"])
    return _stop_at(config.max_bytes, documents, stages["limit"])


def _stop_at(max_bytes: int | None, documents: Iterable[Document], counts: Counter[str]) -> Iterator[Document]:
    for document in documents:
        if max_bytes is not None and counts["bytes"] + document.num_bytes > max_bytes:
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
    fraction = wanted.train_bytes / max(1, _expected_bytes(config, files))

    def sample() -> Iterator[str]:
        unused = {"sources": Counter(), "dedup": Counter(), "limit": Counter()}
        for document in _documents(config, files, unused):
            text = document.text
            is_training = split_of(text, seed=config.seed, validation_fraction=config.validation_fraction) == "train"
            if is_training and in_tokenizer_sample(text, seed=config.seed, fraction=fraction):
                counts["bytes"] += document.num_bytes
                yield text

    return train_bpe(sample(), wanted.train_vocab_size), counts["bytes"]


def _expected_bytes(config: PrepareConfig, files: Sequence[InputFile]) -> int:
    """The most text there can be, for the progress bar and for sampling."""
    total = sum(file.num_bytes for file in files)
    return total if config.max_bytes is None else min(total, config.max_bytes)


def _check_sums(stages: dict[str, Counter[str]], indices: dict[str, SplitIndex]) -> None:
    """What goes into a stage comes out of it or is counted as left out."""
    sources, dedup, limit = stages["sources"], stages["dedup"], stages["limit"]
    assert sources["files_not_reached"] == 0 or limit["over_limit"] == 1, sources
    assert sources["documents"] == dedup["documents"] + dedup["duplicates"], stages
    assert sources["bytes"] == dedup["bytes"] + dedup["duplicate_bytes"], stages
    assert dedup["documents"] == limit["documents"] + limit["over_limit"], stages
    assert limit["documents"] == sum(index.num_documents for index in indices.values()), (stages, indices)
    assert limit["bytes"] == sum(index.text_bytes for index in indices.values()), (stages, indices)
    for index in indices.values():
        assert index.num_rows * index.seq_length == index.num_tokens + index.num_padding, index


def _in_words(report: dict[str, Any]) -> str:
    lines = []
    for name, counts in report["stages"].items():
        lines.append(f"{name:>10}: " + ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items()))
    for split, index in report["splits"].items():
        lines.append(
            f"{split:>10}: {index['num_documents']:,} documents, {index['text_bytes']:,} bytes of text, "
            f"{index['num_tokens']:,} tokens ({index['text_bytes'] / index['num_tokens']:.2f} bytes each), "
            f"{index['num_rows']:,} rows of {index['seq_length']} with {index['num_padding']} pad ids, {index['dtype']}"
        )
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
