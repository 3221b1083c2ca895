"""Attention with document masks on one GPU: every back end against the dense definition, then timed against the floor.

    python benchmarks/attention.py [--out benchmarks/results/attention.json]

LFM-3B's shape: 8192 tokens, 24 heads, 8 key/value heads, head size 128, bf16.  A back end whose outputs or gradients
are off prints no time.  The floor is the attended FLOPs over the data sheet's 989 TFLOP/s; forward is 4, forward and
backward 14 FLOPs per attended (query, key, head, channel).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from lfm.layers.attention import attend
from lfm.layers.documents import Documents
from lfm.training.run import environment

T, HEADS, GROUPS, K = 8192, 24, 8, 128
PATTERNS = {
    "1 document": [T],
    "8 of 1024": [1024] * 8,
    "14, log-normal": [2011, 187, 512, 90, 1203, 655, 61, 340, 1490, 233, 410, 129, 777, 94],
}
PEAK, BOUND = 989e12, 1e-2


def inputs(length: int) -> list[torch.Tensor]:
    shapes = [(1, h, length, K) for h in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def worst_error(backend: str, lengths: list[int]) -> float:
    """Largest relative error of output and gradients against the dense definition in fp32, at a quarter length."""
    quarter = [max(1, n // 4) for n in lengths]
    quarter[-1] += T // 4 - sum(quarter)
    documents = Documents.from_lengths([quarter], "cuda")
    leaves = inputs(T // 4)
    found = []
    for name, leaf in (("reference", [x.detach().float().requires_grad_() for x in leaves]), (backend, leaves)):
        y = attend(*leaf, documents, backend=name)
        weight = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        found.append([y, *torch.autograd.grad(y, leaf, weight)])
    pairs = zip(*found, strict=True)
    return max(float((b.float() - a.float()).norm() / a.float().norm()) for a, b in pairs)


def milliseconds(run) -> float:
    for _ in range(5):
        run()
    times = []
    for _ in range(30):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device")
    rows = []
    print(f"{'documents':16} {'backend':8} {'error':>8} {'forward':>9} {'fwd+bwd':>9} {'floor':>7} {'of floor':>8}")
    for pattern, lengths in PATTERNS.items():
        documents = Documents.from_lengths([lengths], "cuda")
        floor = 14 * documents.attended_pairs * HEADS * K / PEAK * 1e3
        for backend in ("sdpa", "flex"):
            error = worst_error(backend, lengths)
            row = {"documents": pattern, "backend": backend, "relative_error": error, "floor_ms": floor}
            rows.append(row)
            if not error < BOUND:
                print(f"{pattern:16} {backend:8} {error:8.1e}  not timed: parity is red")
                continue
            leaves = inputs(T)
            grad = torch.randn(1, HEADS, T, K, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                row["forward_ms"] = milliseconds(lambda x=leaves, b=backend, d=documents: attend(*x, d, backend=b))
            row["forward_backward_ms"] = both = milliseconds(
                lambda x=leaves, b=backend, d=documents, g=grad: torch.autograd.grad(attend(*x, d, backend=b), x, g)
            )
            times = f"{row['forward_ms']:8.2f}  {both:8.2f}  {floor:6.2f}  {both / floor:7.1f}x"
            print(f"{pattern:16} {backend:8} {error:8.1e} {times}", flush=True)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps({"environment": environment(), "calls": 30, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
