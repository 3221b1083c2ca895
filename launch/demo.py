"""`make demo`: shards from the Python standard library, a trained `lfm_debug`, what it learnt, and where to look.

python launch/demo.py [key.path=value ...]      overrides of configs/lfm_debug.yaml
"""

import argparse
import functools
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.stream import open_split
from lfm.data.tokenizer import Tokenizer
from lfm.evaluation.held_out import compressor_bits_per_byte, evaluate, score
from lfm.exits import command
from lfm.files import expanded, read_file
from lfm.inference.load import load_model
from lfm.inference.sampling import SamplingConfig, generate
from lfm.training.loop import train
from lfm.training.run import RunConfig

ROOT = Path(__file__).parent.parent


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prepare text found on this machine, train a tiny model on it, and show what it learnt.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of configs/lfm_debug.yaml:\n" + RunConfig.describe(),
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides, applied in order")
    run = RunConfig.load(ROOT / "configs/lfm_debug.yaml", [*parser.parse_args().overrides, "name=demo"])
    assert run.data.path is not None, "the demo has one data set"
    prepare(PrepareConfig.load(ROOT / "configs/data/stdlib_8k.yaml", [f"output={run.data.path}"]))
    shutil.rmtree(run.folder, ignore_errors=True)  # runs/demo is the demo's own, and trained anew each time
    if train(run).step < run.training.steps:
        return

    model, _, checkpoint = load_model(run.folder, device=torch.device("cpu"), dtype=torch.float32)
    rows = open_split(run.data, "validation", seq_length=run.model.seq_length, vocab_size=run.model.vocab_size)
    text = read_file(expanded(run.data.path) / "validation.txt")
    found = evaluate(functools.partial(score, model), rows)
    sizes = {
        "LFM, held out": found.bits_per_byte(len(text), run.model.vocab_size),
        "unigram entropy of the same tokens": found.unigram_bits_per_byte(len(text)),
        **compressor_bits_per_byte(text, found),
    }
    (run.folder / "bits_per_byte.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    print(f"\nbits per byte on {len(text):,} bytes of text that training never saw:")
    for name, bits in sizes.items():
        print(f"  {name:36} {bits:.3f}")

    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    prompt = tokenizer.encode("def __init__(self, ")
    sampling = SamplingConfig(max_new_tokens=80, temperature=0.7)
    tokens = [t for (t,) in generate(model, [prompt], sampling, end_of_document=tokenizer.eod_id) if t is not None]
    print("\na sample:\n" + tokenizer.decode([*prompt, *tokens]))
    print(f"\nloss curve: {run.folder}/plots/loss.png   checkpoint: {checkpoint}")
    print(f'more text:  .venv/bin/python launch/generate.py --checkpoint {run.folder} --prompt "class "')


if __name__ == "__main__":
    main()
