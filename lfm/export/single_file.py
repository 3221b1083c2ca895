"""`--format safetensors`: one file with the weights, and configuration, tokenizer and progress in its metadata."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lfm.checkpoint.manifest import TOKENIZER_NAME
from lfm.errors import UserError
from lfm.export.incoming import Incoming
from lfm.export.packages import require
from lfm.export.source import Source, expected_tensors
from lfm.export.tensor_files import holdings, save
from lfm.files import read_file, shown

CONFIG, TOKENIZER, RECORD = "lfm.model", "lfm.tokenizer", "lfm.record"
"""Keys of the metadata, whose values are JSON."""


def write(source: Source, out: Path, settings: Any) -> None:
    metadata = {
        CONFIG: json.dumps(source.tree),
        TOKENIZER: read_file(source.path / TOKENIZER_NAME).decode(),
        RECORD: json.dumps(source.record()),
    }
    save(source.read(expected_tensors(source.config), settings.dtype), out, metadata=metadata)


def compare(source: Source, out: Path, settings: Any) -> Iterator[str]:
    """Read it back: every tensor has the bits that were written."""
    safe_open = require("safetensors", purpose="--format safetensors").safe_open
    names = list(expected_tensors(source.config))
    with safe_open(str(out), framework="pt") as opened:
        for name, tensor in source.read(names, settings.dtype).items():
            if not torch.equal(opened.get_tensor(name), tensor):
                raise RuntimeError(f"{name} of {out} is not what was written")
    yield f"{len(names)} tensors have the checkpoint's values" + (
        "" if settings.dtype == torch.float32 else f", rounded to {settings.dtype}".replace("torch.", "")
    )


def read(place: Path) -> Incoming:
    names, metadata = holdings(place)
    try:
        tree = json.loads(metadata[CONFIG])
        record = json.loads(metadata.get(RECORD, "{}"))
        if not isinstance(tree, dict) or not isinstance(record, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise UserError(
            f"{shown(place)} has no model's configuration in its metadata ({CONFIG}); give a file that "
            "`lfm export --format safetensors` wrote, or a folder of --format hf"
        ) from None
    tokenizer = metadata[TOKENIZER].encode() if TOKENIZER in metadata else None
    return Incoming(place, tree, dict.fromkeys(names, place), tokenizer, record)
