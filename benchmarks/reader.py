"""Tokens/s of the reader from one process, MDS's own reader on the same shards beside it, and what training waits for.

    python benchmarks/reader.py [--out benchmarks/results/reader.json]

Random ids in rows of 8192 and shards of 64 MiB, in the page cache.  `first touch` includes hashing every shard.  An
epoch is timed, which for MDS includes the start of its workers.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import numpy as np

from benchmarks.peers.mosaic import stand_in_for_torchvision
from lfm.data.format import RowWriter
from lfm.data.reader import RowReader, ShardReader
from lfm.data.stream import BatchStream
from lfm.training.run import environment

T, ROWS, ROWS_PER_STEP, REPEATS = 8192, 2048, 16, 3


class InOrder(ShardReader):
    """The same rows one after the other."""

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) % len(self)


def write_shards(folder: Path, vocab_size: int) -> None:
    writer = RowWriter(folder, seq_length=T, vocab_size=vocab_size, shard_bytes=64 << 20, compression=None)
    random = np.random.default_rng(0)
    for _ in range(ROWS):
        cuts = np.sort(random.choice(np.arange(1, T), 9, replace=False))
        writer.write(random.integers(0, vocab_size, T), np.diff(cuts, prepend=0, append=T).tolist())
    writer.finish(
        split="train",
        eod_id=0,
        tokenizer_sha256="",
        num_tokens=ROWS * T,
        num_padding=0,
        num_documents=10 * ROWS,
        text_bytes=ROWS * T,
    )


def rate(reader: RowReader, threads: int) -> float:
    """Tokens/s of one epoch of optimizer steps."""
    stream = BatchStream(reader, seed=0, rows_per_step=ROWS_PER_STEP, prefetch_threads=threads)
    start = time.perf_counter()
    for _ in range(ROWS // ROWS_PER_STEP):
        stream.next()
    seconds = time.perf_counter() - start
    stream.close()
    return ROWS * T / seconds


def waiting(reader: RowReader, threads: int, tokens_per_second: float, steps: int = 20) -> float:
    """Share of the time that training at this speed waits for rows; one row a step, the worst case."""
    stream = BatchStream(reader, seed=1, rows_per_step=1, prefetch_threads=threads)
    start = time.perf_counter()
    for _ in range(steps):
        stream.next()
        time.sleep(T / tokens_per_second)
    share = stream.wait_seconds / (time.perf_counter() - start)
    stream.close()
    return share


def peer(folder: Path, shuffle: bool, workers: int) -> float:
    """Tokens/s of StreamingDataset behind torch's DataLoader, ids to int64."""
    if "torchvision" not in sys.modules:
        stand_in_for_torchvision()
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder), shuffle=shuffle, batch_size=ROWS_PER_STEP, num_canonical_nodes=1)

    def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([row["ids"] for row in rows]).astype(np.int64))

    loader = DataLoader(data, batch_size=ROWS_PER_STEP, num_workers=workers, collate_fn=collate)
    start = time.perf_counter()
    tokens = sum(ids.numel() for ids in loader)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reader.json"))
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def note(**found: Any) -> None:
        rows.append(found)
        print(json.dumps(found), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for dtype, vocab_size in (("uint16", 50257), ("uint32", 128256)):
            path = Path(folder) / dtype
            write_shards(path, vocab_size)
            for order, kind in (("sequential", InOrder), ("shuffled", ShardReader)):
                for threads in (0, 1, 2):
                    reader = kind(path)
                    first = rate(reader, threads)
                    rates = [rate(reader, threads) for _ in range(REPEATS)]
                    note(
                        reader="lfm",
                        dtype=dtype,
                        order=order,
                        threads=threads,
                        tokens_per_second=statistics.median(rates),
                        range=[min(rates), max(rates)],
                        first_touch_tokens_per_second=first,
                    )
                    try:
                        rates = [peer(path, order == "shuffled", threads) for _ in range(REPEATS)]
                    except Exception as error:  # whatever keeps the peer from running here is its result
                        note(reader="StreamingDataset", dtype=dtype, order=order, workers=threads, failed=repr(error))
                        continue
                    note(
                        reader="StreamingDataset",
                        dtype=dtype,
                        order=order,
                        workers=threads,
                        tokens_per_second=statistics.median(rates),
                        range=[min(rates), max(rates)],
                    )
        shares = {threads: waiting(ShardReader(Path(folder) / "uint32"), threads, 45_000) for threads in (0, 2)}
        note(training_tokens_per_second=45_000, share_of_time_waited_by_threads=shares)
    where = environment() | {"command": ["benchmarks/reader.py"]}
    result = {"date": date.today().isoformat(), "environment": where, "seq_length": T, "rows": rows}
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
