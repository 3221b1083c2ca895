"""Batches through the processes, and which of their documents stay; every count of a preparation is made here."""

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from data_pipeline.batches import Batch, InputFile
from data_pipeline.dedup import ExactDuplicates, NearDuplicates
from data_pipeline.pool import ordered_map
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.worker import BatchWorker, Dropped, Encoding, Prepared
from lfm.data.bins import BinFile
from lfm.data.format import Split, SplitIndex

_SMALL_INPUT_BYTES = 1 << 23  # starting processes takes longer than preparing it
_SAMPLES_A_RULE = 5
_FILES_LEFT_OUT = ("repeated", "too_large", "unreadable", "not_regular", "not_utf8")

Counts = dict[str, Counter[str]]
Splits = dict[Split, SplitIndex] | dict[Split, BinFile]


def prepared(
    config: PrepareConfig,
    found: Sequence[Sequence[InputFile]],
    batches: Iterable[Batch],
    encoding: Encoding | None,
    *,
    what: str = "prepare",
) -> Iterator[Prepared]:
    """Each batch cleaned and encoded, in order, behind a progress bar; with no `encoding`, texts for a tokenizer."""
    results = ordered_map(_worker(config, encoding), batches, _num_workers(config, found))
    return _with_bar(results, _input_bytes(found), what)


@dataclass(frozen=True)
class Taken:
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


class Collector:
    """Takes prepared batches in order and decides which documents stay; all counts end up here."""

    def __init__(self, config: PrepareConfig, found: Counter[str]) -> None:
        self._config = config
        self._exact = ExactDuplicates()
        self._near = None if config.near_duplicates is None else NearDuplicates(config.near_duplicates)
        self._dropped: dict[str, list[Dropped]] = {}
        names = ("clean", "dedup", "limit", "encode")
        self.stages: Counts = {"sources": Counter(found), **{name: Counter() for name in names}}
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

    def taken(self, batches: Iterable[Prepared]) -> Iterator[Taken]:
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
            yield Taken(ids, lengths, num_bytes, batch.is_validation[mask], "".join(texts).encode())

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

    def count_files_not_reached(self) -> None:
        """Of the files that were found, count those that a limit left unread."""
        of = self.stages["sources"]
        files_left_out = sum(of[f"files_{why}"] for why in _FILES_LEFT_OUT)
        of["files_not_reached"] = of["files_found"] - of["files_read"] - files_left_out

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


def check_sums(stages: Counts, splits: Splits) -> None:
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


def _with_bar(batches: Iterable[Prepared], num_bytes: int | None, what: str) -> Iterator[Prepared]:
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
    if size is not None and size < _SMALL_INPUT_BYTES:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def _input_bytes(found: Sequence[Sequence[InputFile]]) -> int | None:
    """Of all files; None if a source has none, so that its size is not known."""
    return sum(file.num_bytes for of_source in found for file in of_source) if all(found) else None
