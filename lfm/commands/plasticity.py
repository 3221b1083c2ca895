"""Probe plasticity: `python launch/plasticity.py --checkpoint runs/NAME [--words 200]`: does reading teach new words?

Writes plasticity.json and plasticity.png beside the checkpoints of the run, and prints the two comparisons.
"""

import argparse
import json

from pydantic import Field

from lfm.config import Config, add_flags, from_flags, path_flag
from lfm.exits import command
from lfm.files import ready_folder, write_durably


class ProbeConfig(Config):
    words: int = Field(default=200, ge=8, le=100_000)
    """Made-up words, at least one for each of the 8 meanings."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the words and the bootstrap."""


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="The four-way plasticity probe over many made-up words.")
    parser.add_argument("--checkpoint", required=True, type=path_flag, metavar="RUN_OR_STEP", help="of kind liquidnn")
    add_flags(parser, ProbeConfig)
    parser.add_argument("--out", type=path_flag, metavar="FOLDER", help="default: the folder of the run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags = parser.parse_args()
    config = from_flags(ProbeConfig, flags)
    from lfm.evaluation.plasticity import compare, plot, probes, record
    from lfm.inference.load import open_model

    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device)
    out = flags.out or checkpoint.parent.parent
    ready_folder(out)
    found = probes(model, tokenizer, num_words=config.words, seed=config.seed)
    comparisons = compare(found, seed=config.seed)
    content = {"checkpoint": str(checkpoint), "seed": config.seed, **record(found, comparisons)}
    write_durably(out / "plasticity.json", json.dumps(content, indent=1).encode() + b"\n")
    plot(found, out / "plasticity.png")
    for comparison in comparisons:
        print(comparison.sentence())
    print(f"{len(found)} words; details in {out}/plasticity.json, plot in {out}/plasticity.png")
