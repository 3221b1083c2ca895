"""Documents' ids go in, the shards of a split and their counts come out."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.collect import Counts, Taken
from data_pipeline.pack import LABEL_BIT, BestFitPacker, GreedyPacker, OneDocumentPacker, Row, SplitCounter
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.format import SPLITS, Packing, RowWriter, Split, SplitIndex
from lfm.data.tokenizer import Tokenizer
from lfm.files import sync

_PACKERS = {"greedy": GreedyPacker, "one_document": OneDocumentPacker, "best_fit": BestFitPacker}


class SplitWriter:
    """Packs documents into the rows of `folder`/`split`; with `keep_text`, also into `folder`/`split`.txt.

    The text file is the documents end to end, nothing between them, so that compressors can be compared with a model
    in bits per byte on exactly `text_bytes` bytes.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        packing: Packing,
        shard_bytes: int,
        compression: str | None,
        keep_text: bool,
        label_mask: bool = False,
    ) -> None:
        """`label_mask`: rows have one, and labels come with `pack.LABEL_BIT`."""
        self._split: Split = split
        self._tokenizer = tokenizer
        self._packing: Packing = packing
        self._packer = _PACKERS[packing](seq_length, tokenizer.eod_id)
        self._rows = RowWriter(
            folder / split,
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            shard_bytes=shard_bytes,
            compression=compression,
            label_mask=label_mask,
        )
        self._label_mask = label_mask
        self._text = open(folder / f"{split}.txt", "wb") if keep_text else None
        self._num_tokens = self._num_documents = self._text_bytes = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray, *, text_bytes: int, text: bytes) -> None:
        """Append documents: ids end to end, as many a document as `lengths` says; `text` is what they stand for."""
        self._write(self._packer.add(ids, lengths))
        if self._text is not None:
            self._text.write(text)
        self._num_tokens += len(ids)
        self._num_documents += len(lengths)
        self._text_bytes += text_bytes

    def _write(self, rows: Iterable[Row]) -> None:
        for ids, lengths in rows:
            if self._label_mask:
                self._rows.write(ids & ~LABEL_BIT, lengths, label_mask=(ids & LABEL_BIT) > 0)
            else:
                self._rows.write(ids, lengths)

    @property
    def num_cropped(self) -> int:
        """Ids that the packing left out."""
        return self._packer.num_cropped

    def finish(self) -> SplitIndex:
        """Write what is left, and the index; all of it is on the disk afterwards."""
        self._write(self._packer.finish())
        if self._text is not None:
            self._text.close()
            sync(Path(self._text.name))
        return self._rows.finish(
            split=self._split,
            eod_id=self._tokenizer.eod_id,
            tokenizer_sha256=self._tokenizer.sha256,
            num_tokens=self._num_tokens - self.num_cropped,
            num_padding=self._packer.num_padding,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            packing=self._packing,
        )


def write_shards(
    config: PrepareConfig, tokenizer: Tokenizer, taken: Iterable[Taken], stages: Counts, folder: Path
) -> dict[Split, SplitIndex]:
    """The shards of both splits; what packing did is counted in `stages`."""
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
            label_mask=config.labels == "completion",
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
