"""Documents to ids."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from data_pipeline.sources import Document
from lfm.data.tokenizer import Tokenizer

_BATCH = 256  # documents; enough to keep all cores busy, little enough to hold in memory


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, counts: Counter[str], *, separator: Literal["eod", "none"]
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids, uint32 `[n]`, the last of which is the end-of-document id if `separator` is eod."""
    end = [tokenizer.eod_id] if separator == "eod" else []
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        for document, ids in zip(batch, tokenizer.encode_batch([item.text for item in batch]), strict=True):
            counts["documents"] += 1
            counts["tokens"] += len(ids) + len(end)
            yield document, np.array([*ids, *end], np.uint32)
