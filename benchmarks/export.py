"""What `lfm export` makes of runs, by numbers: the tables of docs/export.md.

    python benchmarks/export.py [--format onnx] runs/A runs/B ...

Of hf, for each: the export as transformers loads it with trust_remote_code, the largest difference of its logits from
the checkpoint's over two rows, how many of 256 greedy tokens are alike, whether weights come back bit for bit, and how
large weights and code are.  Of onnx: the same difference and count over what `lfm export` compares, and tokens a second
of its graphs in onnxruntime beside those of the checkpoint's model in torch, of one row on one thread.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch
from transformers import AutoModelForCausalLM

from lfm.checkpoint.tensors import tensor_hash
from lfm.export import formats, huggingface, onnx_graphs
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


def onnx_row(run: str) -> str:
    source = Source(run)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        onnx_graphs.write(source, out, formats.Settings())
        prefill, step = (onnx_graphs.Runner(out / f"{name}.onnx", threads=1) for name in onnx_graphs.GRAPHS)
        worst, _, alike, steps = onnx_graphs.compared(source, prefill, step)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        ours, empty = source.model(torch.float32), prefill.empty_state(1)
        ids = torch.randint(0, source.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            rates = [
                rate(prefill, ids, empty),
                rate(lambda ids, state: of_torch(ours, ids, state), ids, None),
                rate(step, ids, empty, by_token=True),
                rate(lambda ids, state: of_torch(ours, ids, state), ids, None, by_token=True),
            ]
    speeds = " | ".join(f"{round(speed, -1):,.0f}" for speed in rates)
    return f"| {source.kind} | {worst:.1e} | {alike} of {2 * steps} | {speeds} | {size:.1f} |"


def of_torch(model: Any, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    hidden, state = model.advance(ids, state)
    return model.logits(hidden), state


def rate(call: Callable[..., Any], ids: torch.Tensor, state: Any, *, by_token: bool = False) -> float:
    """Tokens a second of the fastest of five passes over `ids` `[1, T]`."""
    seconds = []
    for _ in range(5):
        begin, now = time.perf_counter(), state
        for columns in ids.split(1 if by_token else ids.shape[1], dim=1):
            _, now = call(columns, now)
        seconds.append(time.perf_counter() - begin)
    return ids.shape[1] / min(seconds)


HEADS = {
    "hf": ["family", "logits", "greedy tokens alike", "weights come back", "weights, MB", "code, kB"],
    "onnx": [
        *("family", "logits", "greedy tokens alike", "prefill, tokens/s", "torch", "step, tokens/s", "torch"),
        "folder, MB",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", choices=HEADS, default="hf")
    parser.add_argument("runs", nargs="+")
    flags = parser.parse_args()
    torch.set_num_threads(1 if flags.format == "onnx" else torch.get_num_threads())
    head = HEADS[flags.format]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for run in flags.runs:
        print({"hf": row, "onnx": onnx_row}[flags.format](run), flush=True)


if __name__ == "__main__":
    main()
