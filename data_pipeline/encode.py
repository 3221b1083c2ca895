"""Documents to ids."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipeline.sources import Document
from lfm.data.tokenizer import Tokenizer

_BATCH = 256  # documents; enough to keep all cores busy, little enough to hold in memory


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids, uint32 `[n]`, the last of which is the end-of-document id."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        for document, ids in zip(batch, tokenizer.encode_batch([item.text for item in batch]), strict=True):
            yield document, np.array([*ids, tokenizer.eod_id], np.uint32)
