"""Text to shards, ours beside `datasets.map` with MDSWriter:

    python benchmarks/prepare.py --text FILE --tokenizer FILE [--runs 3]

Both read the same lines of JSON, drop equal texts, encode with the same ids, pack them greedily into rows of the same
length and write uncompressed MDS shards.  A last case is the HTML of Debian's packages, as in the first source of
configs/data/debian_docs.yaml: text out of markup, poor lines and near-duplicates dropped.  Its tokens are those kept.
The result goes to benchmarks/results/prepare.json.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import numpy as np
import yaml

from benchmarks.peers.mosaic import stand_in_for_torchvision
from data_pipeline import extras
from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.sources import DebianConfig, find_files
from lfm.data.tokenizer import Tokenizer, from_tiktoken

SEQ_LENGTH = 2048


def ours(text: Path, tokenizer: Path, folder: Path, workers: int, **changes) -> int:
    tree = {
        "output": str(folder / "ours"),
        "sources": [{"kind": "jsonl", "paths": [str(text)]}],
        "tokenizer": {"file": str(tokenizer)},
        "seq_length": SEQ_LENGTH,
        "num_workers": workers,
        **changes,
    }
    return prepare(PrepareConfig.from_tree(tree, source="benchmark"))["stages"]["encode"]["tokens"]


def html_source() -> dict:
    """The first source of debian_docs.yaml."""
    [source, *_] = yaml.safe_load(Path("configs/data/debian_docs.yaml").read_text(encoding="utf-8"))["sources"]
    return source


def html_bytes() -> int:
    source = DebianConfig.model_validate(html_source())
    return sum(file.num_bytes for file in find_files([source], Counter())[0])  # fetched now, if they are not here


def datasets_map(text: Path, tokenizer: Path, folder: Path, workers: int) -> int:
    encoder = from_tiktoken(tokenizer) if tokenizer.suffix == ".tiktoken" else Tokenizer.from_file(tokenizer)
    rows = datasets.load_dataset("json", data_files=[str(text)], split="train", cache_dir=str(folder / "cache"))
    seen: set[bytes] = set()

    def is_new(document: dict) -> bool:
        digest = hashlib.blake2b(document["text"].encode(), digest_size=16).digest()
        before = len(seen)
        seen.add(digest)
        return len(seen) > before

    def encode(batch: dict) -> dict:
        return {"ids": [[*ids, encoder.eod_id] for ids in encoder.encode_batch(batch["text"])]}

    rows = rows.filter(is_new, load_from_cache_file=False)
    columns = rows.column_names
    rows = rows.map(encode, batched=True, num_proc=workers, remove_columns=columns, load_from_cache_file=False)
    stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {"ids": f"ndarray:uint16:{SEQ_LENGTH}"}
    writer = MDSWriter(out=str(folder / "mds"), columns=columns, hashes=["xxh64"], size_limit=1 << 26)
    held, tokens = np.empty(0, np.uint16), 0
    for batch in rows.with_format("numpy").iter(batch_size=256):
        held = np.concatenate([held, *batch["ids"]]).astype(np.uint16)
        full = len(held) // SEQ_LENGTH * SEQ_LENGTH
        for row in held[:full].reshape(-1, SEQ_LENGTH):
            writer.write({"ids": row})
        tokens, held = tokens + full, held[full:]
    writer.finish()
    return tokens + len(held)


def measure(run: Callable[..., int], *arguments, input_bytes: int, **changes) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, cpu_seconds() as cpu:
        started = time.monotonic()
        tokens = run(*arguments[:2], Path(folder), *arguments[2:], **changes)
        seconds = time.monotonic() - started
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu[0],
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu[0],
        "input_bytes": input_bytes,
        "megabytes_per_second": input_bytes / seconds / 1e6,
        "load_before": os.getloadavg()[0],
    }


@contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    """Of this process and of its children that have ended."""

    def used() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    result = [0.0]
    before = used()
    yield result
    result[0] = used() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="lines of JSON with a text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or .tiktoken")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepare.json"))
    flags = parser.parse_args()
    datasets.disable_progress_bars()
    cases: dict[str, tuple[Callable[..., int], dict]] = {
        "ours": (ours, {}),
        "ours, best_fit": (ours, {"packing": "best_fit"}),
        "ours, without tiktoken": (ours, {"tokenizer_backend": "tokenizers"}),
        "datasets.map and MDSWriter": (datasets_map, {}),
    }
    if extras.has("rensa"):
        cases["ours, near-duplicates dropped"] = (ours, {"near_duplicates": 0.8})
        html = {"sources": [html_source()], "packing": "best_fit", "near_duplicates": 0.8}
        cases["ours, HTML, near-duplicates dropped"] = (ours, html)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(flags.runs):  # in turn, so that other work on the machine meets all of them
        for name, (run, changes) in cases.items():
            size = html_bytes() if "sources" in changes else flags.text.stat().st_size
            runs[name].append(measure(run, flags.text, flags.tokenizer, flags.workers, input_bytes=size, **changes))
    packages = ("tokenizers", "tiktoken", "datasets", "mosaicml-streaming", "numpy")
    result = {
        "date": date.today().isoformat(),
        "environment": {
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            **{name: version(name) for name in packages if extras.has(name.replace("mosaicml-", ""))},
        },
        "workers": flags.workers,
        "median_tokens_per_second": {
            name: statistics.median(run["tokens_per_second"] for run in of) for name, of in runs.items()
        },
        "median_tokens_per_cpu_second": {
            name: statistics.median(run["tokens_per_cpu_second"] for run in of) for name, of in runs.items()
        },
        "runs": runs,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, rate in result["median_tokens_per_second"].items():
        print(f"{name:36} {rate / 1e6:6.2f} M tokens/s")


if __name__ == "__main__":
    main()
