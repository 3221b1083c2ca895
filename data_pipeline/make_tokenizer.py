"""The tokenizer of a data set: read or trained, with a beginning-of-text id or without, and what encodes as it does."""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline import hub
from data_pipeline.batches import Batch, InputFile, documents
from data_pipeline.clean import clean
from data_pipeline.collect import Collector, prepared
from data_pipeline.fast_tokenizer import FastEncoder, first_difference
from data_pipeline.prepare_config import PrepareConfig, TokenizerConfig
from data_pipeline.report import left_out
from data_pipeline.sources import read_batches
from data_pipeline.worker import Prepared
from lfm.data.format import TOKENIZER_NAME
from lfm.data.tokenizer import BEGIN_OF_TEXT_NAMES, Tokenizer, read_tokenizer, train_bpe
from lfm.errors import UserError
from lfm.files import exists, expanded

_COMPARED_DOCUMENTS, _COMPARED_CHARACTERS = 64, 20_000  # about a second


def make_tokenizer(
    config: PrepareConfig, found: Sequence[Sequence[InputFile]], counts: Counter[str]
) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many bytes of text it was trained on (0 if it was read from a file).

    Raises UserError if there is no text to train one on, or no beginning-of-text token where `bos` asks for one.
    """
    tokenizer, text_bytes = _read_or_trained(config, found, counts)
    if config.bos != (tokenizer.bos_id is not None):
        tokenizer = tokenizer.beginning_with(_begin_of_text(tokenizer) if config.bos else None)
    return tokenizer, text_bytes


def _read_or_trained(
    config: PrepareConfig, found: Sequence[Sequence[InputFile]], counts: Counter[str]
) -> tuple[Tokenizer, int]:
    wanted = config.tokenizer
    if wanted.file is not None:
        return read_tokenizer(tokenizer_file(wanted), wanted.tiktoken_pattern), 0
    assert wanted.train_vocab_size is not None
    batches = read_batches(config.sources, found, config.labels, tail=config.tail_of_files)
    sampled = prepared(config, found, batches, None, what="tokenizer")
    texts = _sample(Collector(config, counts), sampled, wanted.train_bytes)
    tokenizer = train_bpe(texts, wanted.train_vocab_size, allow_smaller=wanted.allow_smaller)
    return tokenizer, sum(len(text.encode()) for text in texts)


def tokenizer_file(wanted: TokenizerConfig) -> Path:
    """The file that `wanted.file` names: itself, that of a folder, or that of a model on the hub.  Raises UserError."""
    assert wanted.file is not None
    path = expanded(wanted.file)
    if path.is_dir():
        return path / TOKENIZER_NAME
    if not exists(path) and hub.is_name(wanted.file):
        return hub.tokenizer_file(wanted.file, wanted.revision)
    return path


def _sample(collector: Collector, batches: Iterable[Prepared], num_bytes: int) -> list[str]:
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
        raise UserError(f"the sources hold no text to train a tokenizer on; add some{left_out(collector.stages)}")
    return [text for _, _, _, text in sorted(heap, key=lambda item: item[1])]


def fast_encoder(config: PrepareConfig, tokenizer: Tokenizer, first: Batch | None) -> FastEncoder | None:
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
