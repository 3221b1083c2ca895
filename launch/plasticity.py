"""Probe plasticity: `python launch/plasticity.py --checkpoint runs/NAME [--words 200]`: does reading teach new words?

Writes plasticity.json and plasticity.png beside the checkpoints of the run, and prints the two comparisons.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.config import path_flag
from lfm.errors import UserError, command
from lfm.files import write_durably


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="The four-way plasticity probe over many made-up words.")
    parser.add_argument("--checkpoint", required=True, type=path_flag, metavar="RUN_OR_STEP", help="of kind liquidnn")
    parser.add_argument("--words", type=int, default=200, help="made-up words (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the words and the bootstrap")
    parser.add_argument("--out", type=path_flag, metavar="FOLDER", help="default: the folder of the run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags = parser.parse_args()
    if flags.words < 2:
        raise UserError(f"--words {flags.words} gives no interval; give 2 or more")
    from lfm.training.checkpoint import open_model
    from lfm.training.plasticity import compare, plot, probes, record

    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device)
    found = probes(model, tokenizer, num_words=flags.words, seed=flags.seed)
    comparisons = compare(found, seed=flags.seed)
    out = flags.out or checkpoint.parent.parent
    content = {"checkpoint": str(checkpoint), "seed": flags.seed, **record(found, comparisons)}
    write_durably(out / "plasticity.json", json.dumps(content, indent=1).encode() + b"\n")
    plot(found, out / "plasticity.png")
    for comparison in comparisons:
        print(comparison.sentence())
    print(f"{len(found)} words; details in {out}/plasticity.json, plot in {out}/plasticity.png")


if __name__ == "__main__":
    main()
