"""Text to a data set: `python -m data_pipeline.prepare --config configs/data/NAME.yaml [key=value ...]`.

    find files -> batches -> read, clean, hash, encode -> drop duplicates -> stop at the limits -+-> pack -> shards
                             (in several processes)       (in the order of the files)            +-> .bin files

Documents are encoded before it is known whether another process has met the same text: that costs less than asking.
Neither ids nor counts depend on the number of processes.

Everything is written to a hidden folder beside the output, which takes the output's name when all of it is on the disk:
a killed run leaves nothing that looks like a data set, and running again starts over.
"""

import errno
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from data_pipeline.batches import Batch, InputFile, documents
from data_pipeline.clean import clean
from data_pipeline.dedup import ExactDuplicates, NearDuplicates
from data_pipeline.fast_tokenizer import FastEncoder, first_difference
from data_pipeline.pack import SplitCounter
from data_pipeline.pool import ordered_map
from data_pipeline.report import DROPPED_NAME, REPORT_NAME, check_report, found_report, write_report
from data_pipeline.sources import SourceConfig, StdinConfig, find_files, read_batches, title
from data_pipeline.verify import Verification
from data_pipeline.worker import BatchWorker, Dropped, Encoding, Prepared
from data_pipeline.write_bins import BinsWriter
from data_pipeline.write_shards import SplitWriter
from lfm.config import Bytes, Config, Count, DepthOrZero, PathText, Tokens, Vocabulary, parse_command_line
from lfm.data.bins import BinFile
from lfm.data.format import FORMAT_VERSION, SPLITS, TOKENIZER_NAME, Packing, Split, SplitIndex
from lfm.data.published import TiktokenPattern
from lfm.data.tokenizer import BEGIN_OF_TEXT_NAMES, Tokenizer, read_tokenizer, train_bpe
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import (
    behind_links,
    exists,
    expanded,
    held_alone,
    is_free,
    partial_folder,
    reason,
    replace_folder,
    shown,
    write_durably,
)
from lfm.talk import talking

FEWEST_TOKENS = 1000
"""Of a data set of .bin files: less is a wrong path rather than a corpus."""


_SMALL_INPUT_BYTES = 1 << 23  # starting processes takes longer than preparing it
_SAMPLES_A_RULE = 5
_COMPARED_DOCUMENTS, _COMPARED_CHARACTERS = 64, 20_000  # about a second
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FILES_LEFT_OUT = ("repeated", "too_large", "unreadable", "not_regular", "not_utf8")
_LEFT_OUT = re.compile(r"(files_(?!found|read)|lines_|documents_|dropped_by_)")
_LASTING_NOT = {"output", "overwrite", "num_workers", "tokenizer_backend"}

_Counts = dict[str, Counter[str]]
_Splits = dict[Split, SplitIndex] | dict[Split, BinFile]


class TokenizerConfig(Config):
    train_vocab_size: Vocabulary | None = None
    """Train a byte-level BPE of this many entries on the training split; null: read `file`."""
    train_bytes: Bytes = 16_000_000
    """About how many bytes of text to train it on, taken evenly from all sources."""
    file: PathText | None = None
    """A tokenizer.json, or a tiktoken rank file; null: train one."""
    tiktoken_pattern: TiktokenPattern | None = None
    """How text is cut into words with a rank file; null: published files are known, others get gpt2 and a warning."""

    @model_validator(mode="after")
    def _trained_or_read(self) -> "TokenizerConfig":
        if (self.train_vocab_size is None) == (self.file is None):
            raise ValueError(
                f"train_vocab_size={self.train_vocab_size} and file={self.file}: "
                "set exactly one of the two and make the other null"
            )
        return self


class PrepareConfig(Config):
    output: PathText
    """Folder of the data set: tokenizer.json, both splits, validation.txt and report.json."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where text comes from; read in this order."""
    tokenizer: TokenizerConfig
    format: Literal["mds", "bins"] = "mds"
    """mds: rows in shards, documents apart; bins: all ids end to end in train.bin and val.bin."""
    seq_length: Annotated[Tokens, Field(ge=2)] | None = None
    """Ids in a row of shards; the run that trains on it uses the same.  null for bins: the run cuts the rows."""
    packing: Packing = "greedy"
    """greedy: shards' rows are full, documents go on in the next row; one_document: each row is one, cut or padded;
    best_fit: rows of whole documents, padded, and only documents longer than a row are split."""
    bos: bool = False
    """Begin each document with the tokenizer's beginning-of-text id, which counts as a token.  The data set's
    tokenizer.json says which, so that prompts begin with it too."""
    separator: Literal["eod", "none"] = "eod"
    """What follows each document: its end-of-document id, or, in bins only, nothing."""
    validation: Literal["hash", "tail"] = "hash"
    """Which text is held out: documents chosen by a hash of their text, or, in bins only, the last ids of all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents (hash) or of the ids (tail) in the validation split."""
    shard_bytes: Bytes = 1 << 26
    """Largest size of an uncompressed shard file."""
    compression: Literal["zstd"] | None = None
    """null is best on a shared file system; zstd suits shards that are fetched from a remote."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop documents at least this similar to an earlier one (Jaccard, of runs of five words; 0.8 is usual); null:
    equal ones only.  Needs the extra `dedup`."""
    max_bytes: Bytes | None = None
    """Stop after this many bytes of text, duplicates not counted; null: take all."""
    max_documents: Count | None = None
    """Stop after this many documents, duplicates not counted; null: take all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the choice of validation documents and of the tokenizer's training text."""
    num_workers: DepthOrZero | None = None
    """Processes; 0: this one alone; null: one a core, none for little text.  The result is the same."""
    tokenizer_backend: Literal["auto", "tokenizers"] = "auto"
    """auto: tiktoken, three times as fast, where it is installed and gives the same ids."""
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

    @model_validator(mode="after")
    def _standard_input_once(self) -> "PrepareConfig":
        if any(isinstance(source, StdinConfig) for source in self.sources) and self.tokenizer.file is None:
            raise ValueError(
                "tokenizer.file=null: the standard input can be read only once, and training a tokenizer reads it "
                "first; set tokenizer.file"
            )
        return self


@talking()
def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the data set unless it is there already; returns the content of its report.json.

    Raises UserError if `output` holds something else, a source or the tokenizer cannot be used, a split stays empty, or
    the disk is full.
    """
    started = time.monotonic()
    output = behind_links(expanded(config.output))
    counts: Counter[str] = Counter()
    found = find_files(config.sources, counts)
    fingerprint = _fingerprint(config, found)
    report = found_report(output)
    if report is not None and not config.overwrite:
        check_report(output, report)
    # What the standard input holds now is not known.
    can_differ = config.overwrite or any(isinstance(source, StdinConfig) for source in config.sources)
    if report is not None and report["fingerprint"] == fingerprint and not can_differ:
        problems = Verification(str(output), full=False).run().problems
        if problems:
            raise UserError(f"{problems[0]}; restore it, or set overwrite=true to prepare output={config.output} anew")
        print(f"{shown(config.output)} is already prepared: same config, same inputs")
        return report

    partial = partial_folder(output)
    with held_alone(
        output.with_name(f".{output.name}.lock"),
        unwritable=f"output={config.output} cannot be made; choose another output",
        taken=f"another process is preparing output={config.output}; wait for it or choose another",
    ):
        _check_replaceable(output, config)
        shutil.rmtree(partial, ignore_errors=True)  # a killed run's
        try:
            partial.mkdir()
            report = {"fingerprint": fingerprint, **_build(config, found, counts, partial)}
            report = write_report(partial, report)
            replace_folder(output, by=partial)
        except OSError as error:
            way_out = "make room, or choose another output" if error.errno in _FULL_DISK else "choose another output"
            raise UserError(f"output={config.output} cannot be written ({reason(error)}); {way_out}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    tokens = report["stages"]["encode"]["tokens"]
    print(_in_words(report))
    print(f"{shown(config.output)} is ready, after {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    return report


def _build(
    config: PrepareConfig, found: Sequence[Sequence[InputFile]], counts: Counter[str], folder: Path
) -> dict[str, Any]:
    """Write all files but the report into `folder`; returns the report."""
    tokenizer, tokenizer_text_bytes = _make_tokenizer(config, found, counts)
    if config.bos != (tokenizer.bos_id is not None):
        tokenizer = tokenizer.beginning_with(_begin_of_text(tokenizer) if config.bos else None)
    tokenizer.save(folder / TOKENIZER_NAME)
    collector = _Collector(config, counts)
    batches = read_batches(config.sources, found)
    first = next(batches, None)
    fast = _fast_encoder(config, tokenizer, first)
    if first is not None:
        batches = itertools.chain([first], batches)
    encoding = Encoding(
        definition=tokenizer.definition,
        fast=fast,
        bos_id=tokenizer.bos_id,
        eod_id=tokenizer.eod_id if config.separator == "eod" else None,
        longest=config.seq_length if config.packing == "one_document" else None,
    )
    prepared = ordered_map(_worker(config, encoding), batches, _num_workers(config, found))
    write = _write_bins if config.format == "bins" else _write_shards
    taken = collector.taken(_with_bar(prepared, _input_bytes(found)))
    splits = write(config, tokenizer, taken, collector.stages, folder)
    if collector.lost:
        print(_loss_in_words(collector))
    for split, index in splits.items():
        if index.num_documents == 0:
            num_documents = collector.stages["limit"]["documents"]
            if num_documents == 0:
                raise UserError(f"the sources hold no text; add some{_left_out(collector.stages)}")
            raise UserError(
                f"validation_fraction={config.validation_fraction} of {num_documents} documents leaves the {split} "
                f"split empty; change it or add text{_left_out(collector.stages)}"
            )
    sources = collector.stages["sources"]
    files_left_out = sum(
        sources[f"files_{why}"] for why in ("repeated", "too_large", "unreadable", "not_regular", "not_utf8")
    )
    sources["files_not_reached"] = sources["files_found"] - sources["files_read"] - files_left_out
    _check_sums(collector.stages, splits)
    write_durably(folder / DROPPED_NAME, collector.dropped_lines())
    return {
        "config": _lasting(config),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "trained_on_bytes": tokenizer_text_bytes,
        },
        "stages": {name: dict(sorted(of_stage.items())) for name, of_stage in collector.stages.items()},
        "sources": [
            {"name": title(source), **dict(sorted(of_source.items()))}
            for source, of_source in zip(config.sources, collector.by_source, strict=True)
        ],
        "document_lengths": {str(1 << i): int(n) for i, n in enumerate(collector.lengths) if n > 0},
        "splits": {split: index.model_dump(exclude={"xxh64"}) for split, index in splits.items()},
    }


@dataclass(frozen=True)
class _Taken:
    """What is kept of a batch: ids of documents end to end, and facts about each document."""

    ids: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    """Of the text as far as it is encoded."""
    is_validation: np.ndarray
    validation_text: bytes

    def of_split(self, split: Split) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids, lengths and bytes of text of the documents in a split."""
        mask = self.is_validation == (split == "validation")
        return self.ids[np.repeat(mask, self.lengths)], self.lengths[mask], int(self.num_bytes[mask].sum())


class _Collector:
    """Takes prepared batches in order and decides which documents stay; all counts end up here."""

    def __init__(self, config: PrepareConfig, found: Counter[str]) -> None:
        self._config = config
        self._exact = ExactDuplicates()
        self._near = None if config.near_duplicates is None else NearDuplicates(config.near_duplicates)
        self._dropped: dict[str, list[Dropped]] = {}
        names = ("clean", "dedup", "limit", "encode")
        self.stages: _Counts = {"sources": Counter(found), **{name: Counter() for name in names}}
        of_source = ("documents", "bytes", "documents_kept", "bytes_kept", "tokens")
        self.by_source: list[Counter[str]] = [Counter(dict.fromkeys(of_source, 0)) for _ in config.sources]
        self.lost: Counter[str] = Counter()
        """Characters that the tokenizer does not give back."""
        self.lengths = np.zeros(64, np.int64)
        """How many documents have 2**i .. 2**(i + 1) - 1 ids."""

    def kept(self, batches: Iterable[Prepared]) -> Iterator[tuple[Prepared, list[int]]]:
        """Each batch with the numbers of the documents that stay in it; ends when a limit is reached."""
        for batch in batches:
            for stage, counts in batch.counts.items():
                self.stages[stage].update(counts)
            for dropped in batch.dropped:
                self._keep_sample(dropped)
            kept, is_full = self._within_limits(batch, self._first_ones(batch))
            of_source = self.by_source[batch.source]
            of_source["documents"] += batch.counts["sources"]["documents"]
            of_source["bytes"] += batch.counts["sources"]["bytes"]
            of_source["documents_kept"] += len(kept)
            of_source["bytes_kept"] += int(batch.num_bytes[kept].sum())
            yield batch, kept
            if is_full:
                return

    def taken(self, batches: Iterable[Prepared]) -> Iterator[_Taken]:
        """The ids of the documents that stay."""
        for batch, kept in self.kept(batches):
            assert batch.ids is not None and batch.lengths is not None
            assert batch.tokens_cut is not None and batch.bytes_cut is not None and batch.bytes_lost is not None
            mask = np.zeros(len(batch.lengths), bool)
            mask[kept] = True
            self._count_lost(batch, kept)
            mask &= batch.lengths > 0
            kept = np.flatnonzero(mask).tolist()
            lengths = batch.lengths[mask]
            ids = batch.ids if len(batch.ids) == lengths.sum() else batch.ids[np.repeat(mask, batch.lengths)]
            num_tokens = int(lengths.sum() + batch.tokens_cut[mask].sum())
            self.stages["encode"]["documents"] += len(kept)
            self.stages["encode"]["tokens"] += num_tokens
            self.by_source[batch.source]["tokens"] += num_tokens
            self.lengths += np.bincount(np.log2(np.maximum(lengths, 1)).astype(int), minlength=64)
            if self._config.packing == "one_document":
                self.stages["pack"].update(
                    documents_cut=int(np.count_nonzero(batch.tokens_cut[mask])),
                    tokens_cut=int(batch.tokens_cut[mask].sum()),
                    bytes_cut=int(batch.bytes_cut[mask].sum()),
                )
            texts = [batch.texts[i] for i in kept if batch.is_validation[i]]
            num_bytes = (batch.num_bytes - batch.bytes_cut - batch.bytes_lost)[mask]
            yield _Taken(ids, lengths, num_bytes, batch.is_validation[mask], "".join(texts).encode())

    def _count_lost(self, batch: Prepared, kept: list[int]) -> None:
        """Count what the tokenizer does not give back, and documents of which nothing is left."""
        assert batch.lengths is not None and batch.bytes_lost is not None
        of = self.stages["encode"]
        for i in kept:
            if i not in batch.lost:
                continue
            self.lost.update(batch.lost[i])
            if batch.lengths[i] == 0:
                of["documents_lost"] += 1
                of["bytes_lost"] += int(batch.num_bytes[i])
                self._keep_sample(Dropped("encode", batch.origins[i], batch.heads[i]))
            else:
                of["documents_with_lost_characters"] += 1
                of["bytes_lost"] += int(batch.bytes_lost[i])

    def dropped_lines(self) -> bytes:
        """Samples of what each rule dropped, as lines of JSON."""
        samples = itertools.chain.from_iterable(self._dropped.values())
        return b"".join(json.dumps(asdict(sample)).encode() + b"\n" for sample in samples)

    def _first_ones(self, batch: Prepared) -> list[int]:
        """The documents that are no copies of earlier ones."""
        counts = self.stages["dedup"]
        kept = []
        for i, (digest, num_bytes) in enumerate(zip(batch.digests, batch.num_bytes.tolist(), strict=True)):
            rule, like = None, None
            if not self._exact.is_new(digest):
                rule = "duplicate"
            elif self._near is not None and batch.sketches is not None:
                like = self._near.original(batch.sketches[i], batch.origins[i])
                rule = None if like is None else "near_duplicate"
            if rule is None:
                kept.append(i)
            else:
                counts[f"{rule}s"] += 1
                counts[f"{rule}_bytes"] += num_bytes
                self._keep_sample(Dropped(rule, batch.origins[i], batch.heads[i], like))
        counts["documents"] += len(kept)
        counts["bytes"] += int(batch.num_bytes[kept].sum())
        return kept

    def _within_limits(self, batch: Prepared, kept: list[int]) -> tuple[list[int], bool]:
        """The documents before the first that exceeds a limit, and whether there is such a one."""
        counts, config = self.stages["limit"], self._config
        sizes = counts["bytes"] + np.cumsum(batch.num_bytes[kept])
        numbers = counts["documents"] + 1 + np.arange(len(kept))
        fits = np.ones(len(kept), bool)
        if config.max_bytes is not None:
            fits &= sizes <= config.max_bytes
        if config.max_documents is not None:
            fits &= numbers <= config.max_documents
        is_full = not fits.all()
        taken = kept[: int(np.argmin(fits))] if is_full else kept
        counts["documents"] += len(taken)
        counts["bytes"] += int(batch.num_bytes[taken].sum())
        counts["over_limit"] += len(kept) - len(taken)
        return taken, is_full

    def _keep_sample(self, dropped: Dropped) -> None:
        samples = self._dropped.setdefault(dropped.rule, [])
        if len(samples) < _SAMPLES_A_RULE:
            samples.append(dropped)


def _write_shards(
    config: PrepareConfig, tokenizer: Tokenizer, taken: Iterable[_Taken], stages: _Counts, folder: Path
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
    if_greedy = {split: SplitCounter(config.seq_length) for split in SPLITS}
    pack = stages["pack"] = Counter(documents_cut=0, tokens_cut=0, bytes_cut=0)
    for batch in taken:
        for split, writer in writers.items():
            ids, lengths, text_bytes = batch.of_split(split)
            writer.add(ids, lengths, text_bytes=text_bytes, text=batch.validation_text)
            if_greedy[split].add(lengths)
            pack["documents_longer_than_a_row"] += int(np.count_nonzero(lengths > config.seq_length))
    indices: dict[Split, SplitIndex] = {split: writer.finish() for split, writer in writers.items()}
    pack["tokens_cut"] += sum(writer.num_cropped for writer in writers.values())
    pack["documents_split_if_greedy"] = sum(counter.num_split for counter in if_greedy.values())
    pack["padding"] = sum(index.num_padding for index in indices.values())
    return indices


def _write_bins(
    config: PrepareConfig, tokenizer: Tokenizer, taken: Iterable[_Taken], stages: _Counts, folder: Path
) -> dict[Split, BinFile]:
    tail = config.validation_fraction if config.validation == "tail" else None
    with BinsWriter(folder, tokenizer, separator=config.separator, tail=tail) as writer:
        for batch in taken:
            if tail is not None:  # in the order of the documents
                text_bytes = int(batch.num_bytes.sum())
                writer.add("train", batch.ids, num_documents=len(batch.lengths), text_bytes=text_bytes, text=b"")
                continue
            for split in SPLITS:
                ids, lengths, text_bytes = batch.of_split(split)
                writer.add(split, ids, num_documents=len(lengths), text_bytes=text_bytes, text=batch.validation_text)
    num_tokens = stages["encode"]["tokens"]
    if num_tokens < FEWEST_TOKENS:
        raise UserError(
            f"the text of all sources is {num_tokens} ids, fewer than the {FEWEST_TOKENS} that format=bins needs; "
            "add text"
        )
    return writer.finish()


def _with_bar(batches: Iterable[Prepared], num_bytes: int | None, what: str = "prepare") -> Iterator[Prepared]:
    """The same, while a progress bar shows how much of `num_bytes` of input has passed; None: of an unknown amount."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        tokens, started = 0, time.monotonic()
        for batch in batches:
            if batch.lengths is not None:
                tokens += int(batch.lengths.sum())
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started) / 1e6:.2f}M tokens/s", refresh=False)
            yield batch
            bar.update(batch.input_bytes)


def _worker(config: PrepareConfig, encoding: Encoding | None) -> BatchWorker:
    return BatchWorker(
        clean=[source.clean for source in config.sources],
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        near_duplicates=config.near_duplicates is not None and encoding is not None,
        encoding=encoding,
    )


def _num_workers(config: PrepareConfig, found: Sequence[Sequence[InputFile]]) -> int:
    if config.num_workers is not None:
        return config.num_workers
    size = _input_bytes(found)
    return 0 if size is not None and size < _SMALL_INPUT_BYTES else len(os.sched_getaffinity(0))


def _make_tokenizer(
    config: PrepareConfig, found: Sequence[Sequence[InputFile]], counts: Counter[str]
) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many bytes of text it was trained on (0 if it was read from a file)."""
    wanted = config.tokenizer
    if wanted.file is not None:
        return read_tokenizer(expanded(wanted.file), wanted.tiktoken_pattern), 0
    assert wanted.train_vocab_size is not None
    batches = read_batches(config.sources, found)
    prepared = ordered_map(_worker(config, None), batches, _num_workers(config, found))
    texts = _sample(
        _Collector(config, counts), _with_bar(prepared, _input_bytes(found), "tokenizer"), wanted.train_bytes
    )
    return train_bpe(texts, wanted.train_vocab_size), sum(len(text.encode()) for text in texts)


def _sample(collector: _Collector, batches: Iterable[Prepared], num_bytes: int) -> list[str]:
    """About `num_bytes` of training text, in order: the documents with the smallest keys, near-duplicates too."""
    heap: list[tuple[float, int, int, str]] = []  # the largest key first
    total = number = 0
    for batch, kept in collector.kept(batches):
        assert batch.keys is not None
        for i in kept:
            if i not in batch.texts:
                continue
            size = int(batch.num_bytes[i])
            heapq.heappush(heap, (-batch.keys[i], number, size, batch.texts[i]))
            total, number = total + size, number + 1
            while total - heap[0][2] >= num_bytes:
                total -= heapq.heappop(heap)[2]
    if not heap:
        raise UserError(f"the sources hold no text to train a tokenizer on; add some{_left_out(collector.stages)}")
    return [text for _, _, _, text in sorted(heap, key=lambda item: item[1])]


def _fast_encoder(config: PrepareConfig, tokenizer: Tokenizer, first: Batch | None) -> FastEncoder | None:
    """tiktoken, if it can encode as the tokenizer does and does so on the first documents; else None."""
    if config.tokenizer_backend != "auto":
        return None
    fast = FastEncoder.make(tokenizer)
    if isinstance(fast, FastEncoder):
        texts = []
        if first is not None:
            rules = config.sources[first.source].clean
            sample = itertools.islice(documents(first, Counter()), _COMPARED_DOCUMENTS)
            texts = [clean(document.text, rules).text[:_COMPARED_CHARACTERS] for document in sample]
        difference = first_difference(fast, tokenizer, texts)
        if difference is None:
            return fast
        fast = f"tiktoken encodes {difference} differently"
    print(f"encoding with Hugging Face tokenizers rather than tiktoken: {fast}")
    return None


def _begin_of_text(tokenizer: Tokenizer) -> str:
    known = [name for name in BEGIN_OF_TEXT_NAMES if tokenizer.id_of(name) is not None]
    if not known:
        raise UserError(
            f"bos=true: the tokenizer has no beginning-of-text token, such as {BEGIN_OF_TEXT_NAMES[0]}; set bos=false"
        )
    return known[0]


def _input_bytes(found: Sequence[Sequence[InputFile]]) -> int | None:
    """Of all files; None if a source has none, so that its size is not known."""
    return sum(file.num_bytes for of_source in found for file in of_source) if all(found) else None


def _check_sums(stages: _Counts, splits: _Splits) -> None:
    """What goes into a stage comes out of it or is counted as left out."""
    sources, cleaned, dedup, limit, encoded = (
        stages[name] for name in ("sources", "clean", "dedup", "limit", "encode")
    )
    cut = stages.get("pack", Counter())
    assert sources["files_not_reached"] == 0 or limit["over_limit"] > 0, sources
    dropped = {key: n for key, n in cleaned.items() if key.startswith("dropped_by_")}
    assert sources["documents"] == cleaned["documents"] + sum(dropped.values()), stages
    bytes_dropped = sum(cleaned[f"bytes_{key}"] for key in dropped)
    assert sources["bytes"] == cleaned["bytes"] + cleaned["bytes_taken_out"] + bytes_dropped, stages
    copies = dedup["duplicates"] + dedup["near_duplicates"]
    assert cleaned["documents"] == dedup["documents"] + copies, stages
    assert cleaned["bytes"] == dedup["bytes"] + dedup["duplicate_bytes"] + dedup["near_duplicate_bytes"], stages
    assert dedup["documents"] == limit["documents"] + limit["over_limit"], stages
    assert limit["documents"] == encoded["documents"] + encoded["documents_lost"], stages
    assert encoded["tokens"] == sum(split.num_tokens for split in splits.values()) + cut["tokens_cut"], (stages, splits)
    for split in splits.values():
        if isinstance(split, SplitIndex):
            assert split.num_rows * split.seq_length == split.num_tokens + split.num_padding, split
    if all(split.num_documents is not None for split in splits.values()):
        assert encoded["documents"] == sum(split.num_documents or 0 for split in splits.values()), (stages, splits)
        text_bytes = sum(split.text_bytes or 0 for split in splits.values())
        assert limit["bytes"] == text_bytes + cut["bytes_cut"] + encoded["bytes_lost"], (stages, splits)


def _loss_in_words(collector: _Collector) -> str:
    of = collector.stages["encode"]
    most = ", ".join(f"{character!a}" for character, _ in collector.lost.most_common(5))
    whole = f", and nothing of {of['documents_lost']:,} more, which are left out" if of["documents_lost"] else ""
    return (
        f"warning: the tokenizer does not give back {of['bytes_lost']:,} bytes of text, {collector.lost.total():,} "
        f"characters such as {most}, in {of['documents_with_lost_characters']:,} documents{whole}; bits per byte count "
        "only what it gives back. A byte-level tokenizer.file, or train_vocab_size, keeps everything"
    )


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
    return config.model_dump(mode="json", exclude=_LASTING_NOT)


def _fingerprint(config: PrepareConfig, found: Sequence[Sequence[InputFile]]) -> str:
    """Equal for equal configs over unchanged inputs; the inputs count by path, size and time, without reading them."""
    inputs = [(str(file.path), file.num_bytes, file.mtime_ns) for of_source in found for file in of_source]
    if config.tokenizer.file is not None:
        path = expanded(config.tokenizer.file)
        if path.exists():  # if not, reading it says so
            inputs.append((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns))
    content = json.dumps([FORMAT_VERSION, _lasting(config), inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _check_replaceable(output: Path, config: PrepareConfig) -> None:
    is_data_set = found_report(output) is not None
    if is_data_set and not config.overwrite:
        raise UserError(
            f"output={config.output} holds a data set of another config or of inputs that have changed since; "
            "choose another output, or set overwrite=true to replace it"
        )
    if not is_data_set and not is_free(output):
        damaged = f" (its {REPORT_NAME} is damaged)" if exists(output / REPORT_NAME) else ""
        raise UserError(
            f"output={config.output} exists and is no data set of this program{damaged}; choose another output"
        )


def _left_out(stages: _Counts) -> str:
    """What was left out and why, as the end of a sentence."""
    why = {key: n for key, n in sorted((stages["sources"] + stages["clean"]).items()) if n and _LEFT_OUT.match(key)}
    if not why:
        return ""
    return " (left out: " + ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in why.items()) + ")"


@command
def main(argv: Sequence[str] | None = None) -> None:
    config, _ = parse_command_line(PrepareConfig, "Prepare a data set: text to tokenized shards.", argv)
    assert isinstance(config, PrepareConfig)
    prepare(config)


if __name__ == "__main__":
    main()
