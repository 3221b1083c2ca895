"""How often the plasticity probe says `a gain` where nothing can have been learnt:
`python benchmarks/plasticity_control.py --checkpoint runs/liquidnn_debug [--draws 16] [--words 16]`.

The plastic parameters of a trained model are drawn anew at random, large, and never trained.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lfm.evaluation.plasticity import compare, probes
from lfm.inference.load import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--words", type=int, default=16)
    flags = parser.parse_args()
    model, tokenizer, _ = open_model(flags.checkpoint, device="cpu")
    false_gains = 0
    for seed in range(flags.draws):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("alpha"):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
                if name.endswith("log_eta"):
                    parameter.zero_()
        comparisons = compare(probes(model, tokenizer, num_words=flags.words, seed=0), seed=0)
        false_gains += any(comparison.learnt for comparison in comparisons)
        for comparison in comparisons:
            print(f"draw {seed}: {comparison.sentence()}", flush=True)
    print(f"{false_gains} false gains in {flags.draws} draws")


if __name__ == "__main__":
    main()
