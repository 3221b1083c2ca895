"""A small made-up corpus, the same on every machine, and data sets prepared from it."""

import random
from pathlib import Path

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig

SEQ_LENGTH = 32
VOCAB_SIZE = 320


def texts(num_documents: int, *, words: int = 60) -> list[str]:
    """Distinct texts with awkward characters: accents, Chinese, emoji, CRLF and the name of a special token."""
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("aeinorstlé", k=chance.randint(1, 8))) for _ in range(300)]
    vocabulary += ["你好", "🎉", "\r\n", "\n    ", "<|endoftext|>", "x = 1", "naïve"]
    return [f"{i}: " + " ".join(chance.choices(vocabulary, k=chance.randint(1, words))) for i in range(num_documents)]


def write_texts(folder: Path, contents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(contents):
        (folder / f"{i:05}.txt").write_bytes(text.encode())
    return folder


def config(source: Path, output: Path, **changes) -> PrepareConfig:
    tree = {
        "output": str(output),
        "sources": [{"kind": "text", "paths": [str(source)]}],
        "tokenizer": {"train_vocab_size": VOCAB_SIZE},
        "seq_length": SEQ_LENGTH,
        "validation_fraction": 0.2,
        "shard_bytes": 4096,
    }
    return PrepareConfig.from_tree({**tree, **changes}, source="test")


def make_data_set(folder: Path, *, num_documents: int = 200, **changes) -> Path:
    """A data set of several shards a split in `folder`/data."""
    source = write_texts(folder / "text", texts(num_documents))
    prepare(config(source, folder / "data", **changes))
    return folder / "data"
