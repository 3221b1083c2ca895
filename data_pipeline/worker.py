"""What is done to a batch on its own, in whatever process: read, clean, hash, encode."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline import dedup
from data_pipeline.batches import Batch, Document, documents
from data_pipeline.clean import CleanConfig, clean
from data_pipeline.completions import Span
from data_pipeline.fast_tokenizer import FastEncoder
from data_pipeline.pack import LABEL_BIT
from data_pipeline.split import in_validation, tokenizer_key
from lfm.data.tokenizer import Tokenizer

_SAMPLES_A_RULE = 2
"""Of dropped documents, in each batch."""
SAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Encoding:
    """How documents become ids."""

    definition: bytes
    """Content of the tokenizer.json."""
    fast: FastEncoder | None
    """What does it in place of `tokenizers`."""
    bos_id: int | None
    """What precedes each document; None: nothing."""
    eod_id: int | None
    """What follows each document."""
    longest: int | None
    """Ids after which a document is cut; None: never."""
    marks_labels: bool = False
    """Give labels, which are a part of each document, `pack.LABEL_BIT`, and an end to each span of them."""


@dataclass(frozen=True)
class Dropped:
    """A document that a rule dropped, to be looked at."""

    rule: str
    origin: str
    text: str
    """Its beginning."""
    like: str | None = None
    """Origin of the document it is a copy of, where known."""


@dataclass
class Prepared:
    """A batch without its dropped documents; arrays have an entry for each of the others."""

    source: int
    input_bytes: int
    counts: dict[str, Counter[str]]
    dropped: list[Dropped]
    origins: list[str]
    heads: list[str]
    """Beginnings of the texts."""
    digests: list[bytes]
    num_bytes: np.ndarray
    """Of the texts in UTF-8, int64."""
    is_validation: np.ndarray
    sketches: np.ndarray | None = None
    texts: dict[int, str] = field(default_factory=dict)
    """Those that are needed beyond their ids: validation documents as far as encoded; in a sampling, training ones."""
    keys: np.ndarray | None = None
    """In a sampling: the smaller, the sooner a document is taken."""
    ids: np.ndarray | None = None
    """Of all documents end to end, labels marked.  Of copies, as far as they can be told here, there are none."""
    lengths: np.ndarray | None = None
    tokens_cut: np.ndarray | None = None
    bytes_cut: np.ndarray | None = None
    bytes_lost: np.ndarray | None = None
    """Of the characters that the ids do not give back."""
    lost: dict[int, Counter[str]] = field(default_factory=dict)
    """Those characters, of the documents that have some.  Where nothing else is in one, its length is 0."""


@dataclass
class BatchWorker:
    """Prepares batches, which each process gets in rising order."""

    clean: Sequence[CleanConfig]
    """Of each source."""
    seed: int
    validation_fraction: float
    near_duplicates: bool
    encoding: Encoding | None
    """None: sample training texts for a tokenizer."""
    _seen: set[bytes] = field(default_factory=set)

    def __call__(self, batch: Batch) -> Prepared:
        counts: dict[str, Counter[str]] = {"sources": Counter(), "clean": Counter()}
        dropped: list[Dropped] = []
        kept = self._cleaned(batch, counts, dropped)
        utf8 = [document.text.encode() for document in kept]
        prepared = Prepared(
            batch.source,
            batch.num_bytes,
            counts,
            dropped,
            origins=[document.origin for document in kept],
            heads=[document.text[:SAMPLE_CHARACTERS] for document in kept],
            digests=[dedup.digest(text) for text in utf8],
            num_bytes=np.array([len(text) for text in utf8], np.int64),
            is_validation=np.array(list(map(self._is_held_out, kept, utf8)), bool),
        )
        if self.near_duplicates:
            prepared.sketches = dedup.sketches(utf8)
        if self.encoding is None:
            prepared.keys = np.array([tokenizer_key(text, self.seed) for text in utf8])
            train = np.flatnonzero(~prepared.is_validation).tolist()
            prepared.texts = {i: kept[i].text for i in train}
        else:
            self._encode(kept, prepared, self.encoding)
        return prepared

    def _is_held_out(self, document: Document, text: bytes) -> bool:
        if document.held_out is not None:
            return document.held_out
        return in_validation(text, self.seed, self.validation_fraction)

    def _cleaned(self, batch: Batch, counts: dict[str, Counter[str]], dropped: list[Dropped]) -> list[Document]:
        rules = self.clean[batch.source]
        idle = rules == CleanConfig()
        kept = []
        of = counts["clean"]
        for document in documents(batch, counts["sources"]):
            text, rule = (document.text, None) if idle else clean(document.text, rules)
            if text is document.text:
                num_bytes = document.num_bytes
            else:
                num_bytes = len(text.encode())
                of["bytes_taken_out"] += document.num_bytes - num_bytes
            if rule is not None:
                of[f"dropped_by_{rule}"] += 1
                of[f"bytes_dropped_by_{rule}"] += num_bytes
                if of[f"dropped_by_{rule}"] <= _SAMPLES_A_RULE:
                    dropped.append(Dropped(rule, document.origin, document.text[:SAMPLE_CHARACTERS]))
                continue
            of["documents"] += 1
            of["bytes"] += num_bytes
            kept.append(replace(document, text=text, num_bytes=num_bytes))
        return kept

    def _encode(self, kept: list[Document], prepared: Prepared, encoding: Encoding) -> None:
        # What this process has met before is a copy of an earlier document whatever the other processes have met.
        fresh = []
        for i, digest in enumerate(prepared.digests):
            if digest not in self._seen:
                self._seen.add(digest)
                fresh.append(i)
        found, losses = self._ids([kept[i] for i in fresh], encoding)

        lengths, tokens_cut, bytes_cut, bytes_lost = np.zeros((4, len(kept)), np.int64)
        prepared.texts = {i: kept[i].text for i in fresh if prepared.is_validation[i]}
        for place, i in enumerate(fresh):
            ids, whole = found[place], kept[i].text
            if losses[place]:
                prepared.lost[i] = losses[place]
                whole = without(whole, losses[place])
                bytes_lost[i] = kept[i].num_bytes - len(whole.encode())
                if i in prepared.texts:
                    prepared.texts[i] = whole
                if not whole.strip():
                    found[place] = ids[:0]
                    continue
            if encoding.longest is not None and len(ids) > encoding.longest:
                beginning = ids[: encoding.longest]
                if encoding.marks_labels:  # without the ends within
                    beginning = beginning & ~LABEL_BIT
                    beginning = beginning[beginning != encoding.eod_id]
                text = text_of_beginning(beginning, self._tokenizer, encoding.bos_id)
                if losses[place]:  # of what the ids give back, what is in the document
                    text = without(text, Counter(text) - Counter(whole))
                tokens_cut[i] = len(ids) - encoding.longest
                bytes_cut[i] = kept[i].num_bytes - bytes_lost[i] - len(text.encode())
                if i in prepared.texts:
                    prepared.texts[i] = text
                found[place] = ids = ids[: encoding.longest]
            lengths[i] = len(ids)
        prepared.lengths, prepared.tokens_cut, prepared.bytes_cut = lengths, tokens_cut, bytes_cut
        prepared.bytes_lost = bytes_lost
        prepared.ids = np.concatenate(found) if found else np.empty(0, np.uint32)

    def _ids(self, fresh: list[Document], encoding: Encoding) -> tuple[list[np.ndarray], list[Counter[str]]]:
        """The ids of each document, from its beginning to its end, and the characters that they do not give back.

        Spans are encoded one by one: a prompt's ids are those it gets when a model is given it alone.
        """
        spans = [document.spans or (Span(document.text, True),) for document in fresh]
        texts = [span.text for of_document in spans for span in of_document]
        if encoding.fast is not None:
            parts = iter([self._encode_fast(encoding.fast, text) for text in texts])
        else:
            parts = iter([np.array(ids, np.uint32) for ids in self._tokenizer.encode_batch(texts)])
        before = np.array([] if encoding.bos_id is None else [encoding.bos_id], np.uint32)
        after = np.array([] if encoding.eod_id is None else [encoding.eod_id], np.uint32)
        found, losses = [], []
        for document, of_document in zip(fresh, spans, strict=True):
            own = [next(parts) for _ in of_document]
            if encoding.fast is not None:
                losses.append(Counter[str]())  # what tiktoken can stand for gives everything back
            else:
                losses.append(self._tokenizer.lost(document.text, np.concatenate(own)))
            if encoding.marks_labels:
                own = [
                    np.concatenate([ids, after]) | LABEL_BIT if span.is_label else ids
                    for ids, span in zip(own, of_document, strict=True)
                ]
            ended = encoding.marks_labels and of_document[-1].is_label
            found.append(np.concatenate([before, *own, *([] if ended else [after])]))
        return found, losses

    def _encode_fast(self, fast: FastEncoder, text: str) -> np.ndarray:
        ids = fast.encode(text)
        return np.array(self._tokenizer.encode(text), np.uint32) if ids is None else ids

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.encoding is not None
        return Tokenizer(self.encoding.definition, source="the data set's tokenizer")


def without(text: str, lost: Counter[str]) -> str:
    """`text`, in Unicode's normal form C, but for as many of each character as `lost` has."""
    left = dict(lost)
    kept = []
    for character in unicodedata.normalize("NFC", text):
        if left.get(character, 0) > 0:
            left[character] -= 1
        else:
            kept.append(character)
    return "".join(kept)


def text_of_beginning(ids: np.ndarray, tokenizer: Tokenizer, bos_id: int | None) -> str:
    """The text that the first ids of a document stand for, to its last whole character."""
    if bos_id is not None:
        ids = ids[1:]
    # A character whose bytes are only partly kept decodes to U+FFFD.
    return tokenizer.decode(ids.tolist()).rstrip("\ufffd")
