"""What `lfm export --format hf` makes of runs, by numbers: the table of docs/export.md.

    python benchmarks/export.py runs/A runs/B ...

For each: the export as transformers loads it with trust_remote_code, the largest difference of its logits from the
checkpoint's over two rows, how many of 256 greedy tokens are alike, whether weights come back bit for bit, the sizes of
the weights and of the code.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch
from transformers import AutoModelForCausalLM

from lfm.checkpoint.tensors import tensor_hash
from lfm.export import formats, huggingface
from lfm.export.incoming import write_run
from lfm.export.source import Source, expected_tensors
from lfm.inference.sampling import SamplingConfig, generate

TOKENS, PROMPT = 256, [5, 3, 8, 1]


def row(run: str) -> str:
    source = Source(run)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hf"
        out.mkdir()
        huggingface.write(source, out, formats.Settings())
        theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        ours = source.model(torch.float32)
        length = min(256, source.config.seq_length)
        ids = torch.randint(0, source.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = float((theirs(ids).logits - ours(ids)[0]).abs().max())
        greedy = SamplingConfig(greedy=True, max_new_tokens=TOKENS)
        want = [token for (token,) in generate(ours, [PROMPT], greedy, end_of_document=None)]
        found = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        alike = sum(a == b for a, b in zip(want, found[0, len(PROMPT) :].tolist(), strict=True))
        back = Source(write_run(formats.read(out), Path(folder) / "back", name="back"))
        names = list(expected_tensors(source.config))
        a, b = (of.read(names, torch.float32) for of in (source, back))
        same = all(tensor_hash(a[name]) == tensor_hash(b[name]) for name in names)
        weights = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
        code = (out / huggingface.code_name(source.kind)).stat().st_size / 1e3
    counted = f"{alike} of {len(want)}"
    return f"| {source.kind} | {difference:.1e} | {counted} | {'yes' if same else 'no'} | {weights:.1f} | {code:.0f} |"


def main() -> None:
    print("| family | logits | greedy tokens alike | weights come back | weights, MB | code, kB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for run in sys.argv[1:]:
        print(row(run), flush=True)


if __name__ == "__main__":
    main()
