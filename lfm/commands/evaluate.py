"""Evaluate: `python launch/evaluate.py --checkpoint runs/NAME --data DIR`: held-out loss and bits per byte."""

import argparse
import functools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from lfm.config import Config, add_flags, from_flags, path_flag
from lfm.exits import command
from lfm.files import exists, expanded, shown

Device = Literal["auto", "cpu", "cuda"]


class EvaluateConfig(Config):
    split: Literal["train", "validation"] = "validation"
    """Which rows: those that were trained on, or held out."""
    max_rows: int = Field(default=0, ge=0, lt=1 << 31)
    """Only the first so many rows; 0: all."""
    batch_rows: int = Field(default=8, gt=0, le=1 << 16)
    """Rows scored at once."""


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Score a split of a data set with a trained model.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder, or hf://USER/NAME",
    )
    parser.add_argument(
        "--data", type=path_flag, metavar="DIR", help="data set folder; default: the run's own data.path"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--int8", action="store_true", help="products of 8-bit integers, on a CPU (docs/export.md)")
    add_flags(parser, EvaluateConfig)
    flags = parser.parse_args()
    config = from_flags(EvaluateConfig, flags)
    for line in held_out(flags.checkpoint, data=flags.data, device=flags.device, config=config, int8=flags.int8):
        print(line)


def held_out(
    checkpoint: Path, *, data: Path | None, device: Device, config: EvaluateConfig, int8: bool = False
) -> Iterator[str]:
    """Lines of what a checkpoint's loss on a split is; `data` None: of the data set that its run names.

    Raises UserError for data of another tokenizer, whose ids mean something else, or of rows of another length.
    """
    from lfm.checkpoint.manifest import read_manifest
    from lfm.data.stream import DataConfig, open_split
    from lfm.errors import UserError
    from lfm.evaluation.held_out import evaluate, score
    from lfm.inference.load import open_model

    model, _, checkpoint = open_model(checkpoint, device=device, int8=int8)
    path = data or read_manifest(checkpoint, warn=False)["config"].get("data", {}).get("path")
    if path is None:
        raise UserError(f"{checkpoint} names no single data set that it was trained on; name one with --data DIR")
    c = model.config
    _check_data(expanded(path), config.split, checkpoint, c.seq_length)
    of_data = DataConfig(path=str(path), allow_smaller_tokenizer=True)
    rows = open_split(of_data, config.split, seq_length=c.seq_length, vocab_size=c.vocab_size)
    found = evaluate(
        functools.partial(score, model), rows, max_rows=config.max_rows or None, batch_rows=config.batch_rows
    )
    read = min(config.max_rows or len(rows), len(rows))
    yield f"{checkpoint}: {config.split} split of {path}, {read:,} of {len(rows):,} rows"
    yield f"loss {found.loss:.4f} nats over {found.labels:,} labels, perplexity {math.exp(min(found.loss, 700)):.2f}"
    if read == len(rows) and rows.index.text_bytes and not found.masked:
        bits = found.bits_per_byte(rows.index.text_bytes, c.vocab_size)
        unigram = found.unigram_bits_per_byte(rows.index.text_bytes)
        yield f"{bits:.4f} bits per byte of text (unigram entropy of the same tokens {unigram:.4f})"
    elif found.masked:
        yield "no bits per byte: a mask leaves parts of the text out of the loss"


def _check_data(data: Path, split: str, checkpoint: Path, seq_length: int) -> None:
    from lfm.data.format import INDEX_NAME, TOKENIZER_NAME, read_index
    from lfm.data.tokenizer import Tokenizer
    from lfm.errors import UserError

    own, of_data = checkpoint / TOKENIZER_NAME, data / TOKENIZER_NAME
    again = (
        "name data of the same by --data DIR, or prepare the text by "
        f"`lfm prepare FILE tokenizer.file={shlex.quote(str(own))} seq_length={seq_length} output=DIR`"
    )
    # What is missing is said when the split is opened.
    if exists(of_data) and Tokenizer.from_file(of_data).sha256 != Tokenizer.from_file(own).sha256:
        raise UserError(f"{shown(of_data)} is another tokenizer than the model's, {shown(own)}; {again}")
    if exists(data / split / INDEX_NAME):
        found = read_index(data / split)[0].seq_length
        if found != seq_length:
            raise UserError(f"{shown(data)} has rows of {found} ids and the model reads rows of {seq_length}; {again}")
